"""Roles of parameters: what a parameter is in the model, which decides the rule it gets."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from torch import nn

HEAD_NAMES = frozenset({"lm_head", "head", "output", "unembed", "unembedding", "embed_out"})


class Role(StrEnum):
    """What a parameter is in the model."""

    HIDDEN = "hidden"
    """A matrix (or convolution kernel) between hidden layers."""
    EMBEDDING = "embedding"
    """A table of vectors looked up by index; a head tied to it is the same parameter."""
    HEAD = "head"
    """The last matrix, from hidden states to logits."""
    VECTOR = "vector"
    """Anything with fewer than two dimensions: gains, biases, scalars."""


@dataclass(frozen=True)
class NamedRole:
    """One parameter's role and why it has it."""

    role: Role
    reason: str


def roles(model: nn.Module) -> dict[str, NamedRole]:
    """Return the role of every parameter that requires a gradient, by name, with the reason.

    The type of the module that owns a parameter decides: `nn.Embedding` is an embedding; anything
    of fewer than two dimensions is a vector; the head is the matrix of the module that
    `model.get_output_embeddings()` returns, or, where the model does not say, of one called like an
    output layer (`lm_head`, `head`, `output`, ...) that is not part of a numbered layer; every
    other matrix is hidden. A parameter shared by an embedding and a head counts once, as an
    embedding.
    """
    output = getattr(model, "get_output_embeddings", lambda: None)()
    found: dict[int, tuple[str, NamedRole]] = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            role = _role(path, module, parameter.ndim, output)
            known = found.get(id(parameter))
            if known is None:
                found[id(parameter)] = (f"{path}.{name}" if path else name, role)
            elif Role.EMBEDDING in (role.role, known[1].role):
                tied = NamedRole(Role.EMBEDDING, f"shared by {known[0]} and {path}")
                found[id(parameter)] = (known[0], tied)
    wanted = {id(p) for p in model.parameters() if p.requires_grad}
    return {name: role for key, (name, role) in found.items() if key in wanted}


def _role(path: str, module: nn.Module, ndim: int, output: nn.Module | None) -> NamedRole:
    kind = type(module).__name__
    if ndim < 2:
        return NamedRole(Role.VECTOR, f"{ndim} dimensions")
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return NamedRole(Role.EMBEDDING, f"weight of a {kind}")
    if module is output:
        return NamedRole(Role.HEAD, "the model's output embeddings")
    parts = path.split(".")
    if output is None and parts[-1] in HEAD_NAMES and not any(map(str.isdigit, parts)):
        return NamedRole(Role.HEAD, f"{kind} named {path!r}")
    return NamedRole(Role.HIDDEN, f"matrix of a {kind}")
