"""Roles of parameters: what a parameter is in the model, which decides the rule it gets."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from torch import nn

from steepest.errors import UserError, unknown

HEAD_NAMES = frozenset({"lm_head", "head", "output", "unembed", "unembedding", "embed_out"})
FUSED_NAMES = frozenset({"c_attn", "qkv", "qkv_proj", "wqkv", "to_qkv"})
"""Layers that hold query, key and value one after the other."""
INTERLEAVED_NAMES = frozenset({"query_key_value"})
"""Layers that mix them in an order that differs between models."""
QUERY_KEY_NAMES = frozenset({"q_proj", "k_proj", "wq", "wk", "query", "key", "to_q", "to_k"})

HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads")
"""Attributes that give the number of attention heads."""


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
    """One parameter's role, why it has it, and how its values lie in the tensor."""

    role: Role
    reason: str = "given"
    split: tuple[int, ...] | None = None
    """Rows of the blocks of a fused matrix (query, key, value), None for a matrix of its own."""
    transposed: bool = False
    """Stored [in, out] instead of [out, in]."""
    bank: bool = False
    """A stack of matrices, [count, out, in], as of experts."""
    heads: int | None = None
    """Number of attention heads in the rows of a query or key matrix (of the query block of a fused
    one), 0 where nothing tells, None for any other parameter."""
    doubt: str = ""
    """A sentence on what could be otherwise, empty if nothing is."""


def roles(
    model: nn.Module, override: Mapping[str, Role | str | NamedRole] | None = None
) -> dict[str, NamedRole]:
    """Return the role of every parameter that requires a gradient, by name, with the reason.

    The type of the module that owns a parameter decides: `nn.Embedding` is an embedding; anything
    of fewer than two dimensions, and a stack of biases, is a vector; the head is the matrix that
    `model.get_output_embeddings()` returns, or, where the model does not say, of one called like an
    output layer (`lm_head`, `head`, `output`, ...) that is not part of a numbered layer; every
    other matrix is hidden. A parameter shared by an embedding and a head counts once, as an
    embedding. Fused query-key-value matrices, matrices stored [in, out] and stacks of experts are
    recognised; where something is unclear, `doubt` says what.

    `override` gives the roles of parameters by name or pattern (`{"*.router.weight": "vector"}`).
    Raises UserError for a pattern that matches no parameter, or an unknown role.
    """
    found: dict[int, tuple[str, NamedRole]] = {}
    # The largest table is the vocabulary's: as many rows as there are positions mean nothing.
    tables = [m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)]
    vocabulary = max(tables, default=0)
    output = _output(model)
    for path, module, parent in _modules(model):
        for name, parameter in module.named_parameters(recurse=False):
            role = _role(_Place(path, name, module, parent, parameter), output)
            sizes = parameter.shape[::-1] if role.transposed else parameter.shape
            if role.role is Role.HIDDEN and parameter.ndim == 2 and sizes[0] == vocabulary:
                role = dataclasses.replace(
                    role, doubt="it has as many rows as an embedding, like an output layer"
                )
            known = found.get(id(parameter))
            if known is None:
                found[id(parameter)] = (f"{path}.{name}" if path else name, role)
            elif Role.EMBEDDING in (role.role, known[1].role):
                tied = NamedRole(Role.EMBEDDING, f"shared by {known[0]} and {path}")
                found[id(parameter)] = (known[0], tied)
    wanted = {id(p) for p in model.parameters() if p.requires_grad}
    named = {name: role for key, (name, role) in found.items() if key in wanted}
    return _overridden(named, override or {})


def _overridden(
    named: dict[str, NamedRole], override: Mapping[str, Role | str | NamedRole]
) -> dict[str, NamedRole]:
    for pattern, given in override.items():
        matching = fnmatch.filter(named, pattern)
        if not matching:
            raise unknown("parameter in roles", pattern, named)
        for name in matching:
            if isinstance(given, NamedRole):
                named[name] = given
            else:
                named[name] = dataclasses.replace(
                    named[name], role=as_role(given), reason="given", doubt=""
                )
    return named


def as_role(name: Role | str) -> Role:
    """Return a role by name. Raises UserError with the nearest one for an unknown name."""
    try:
        return Role(name)
    except ValueError:
        raise unknown("role", str(name), [role.value for role in Role]) from None


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module | None]]:
    """Yield every module with its path and the module that holds it."""
    seen = dict(model.named_modules())
    for path, module in seen.items():
        yield path, module, seen.get(path.rpartition(".")[0]) if path else None


def _output(model: nn.Module) -> nn.Module | None:
    """Return the module that the model, or one it wraps, calls its output layer."""
    for module in model.modules():
        ask = getattr(module, "get_output_embeddings", None)
        if callable(ask) and isinstance(found := ask(), nn.Module):
            return found
    return None


@dataclass(frozen=True)
class _Place:
    """Where a parameter is."""

    path: str
    name: str
    module: nn.Module
    parent: nn.Module | None
    parameter: nn.Parameter

    @property
    def kind(self) -> str:
        return type(self.module).__name__

    @property
    def leaf(self) -> str:
        return self.path.rpartition(".")[2]


def _vector(place: _Place) -> NamedRole | None:
    """Return the role of what is no matrix, None for what may be one."""
    shape = place.parameter.shape
    if len(shape) < 2:
        matrix = isinstance(place.module, (nn.Linear, nn.Embedding)) and place.name == "weight"
        doubt = "it is flattened, as by FSDP1 and ZeRO 3; FSDP2 keeps matrices" if matrix else ""
        return NamedRole(Role.VECTOR, f"{len(shape)} dimensions", doubt=doubt)
    if len(shape) > 2 and sum(side > 1 for side in shape) < 2:
        return NamedRole(Role.VECTOR, "one side longer than 1")
    if place.name == "bias" or place.name.endswith("_bias"):
        return NamedRole(Role.VECTOR, f"biases of a {place.kind}")
    return None


def _role(place: _Place, output: nn.Module | None) -> NamedRole:
    if (vector := _vector(place)) is not None:
        return vector
    if isinstance(place.module, (nn.Embedding, nn.EmbeddingBag)):
        return NamedRole(Role.EMBEDDING, f"weight of a {place.kind}")
    if place.module is output:
        return NamedRole(Role.HEAD, "the model's output embeddings")
    numbered = any(map(str.isdigit, place.path.split(".")))
    if output is None and place.leaf in HEAD_NAMES and not numbered:
        return NamedRole(Role.HEAD, f"{place.kind} named {place.path!r}")
    return _hidden(place)


def _hidden(place: _Place) -> NamedRole:
    """Return the role of a matrix between layers, and how it lies in its tensor."""
    p, module = place.parameter, place.module
    hidden = NamedRole(Role.HIDDEN, f"matrix of a {place.kind}")
    sound = f"{place.kind} {place.name}".lower()
    if "emb" in sound or "pos" in place.name.lower():
        return dataclasses.replace(hidden, doubt="its name sounds like an embedding's")
    if p.ndim == 3 and not isinstance(module, nn.modules.conv._ConvNd):
        # transformers marks experts that are stored [count, in, out].
        turned = getattr(module, "is_transposed", False) is True
        reason = f"{p.shape[0]} matrices of a {place.kind}"
        return NamedRole(Role.HIDDEN, reason, bank=True, transposed=turned)
    if p.ndim == 2 and not place.name.endswith("weight"):
        return dataclasses.replace(hidden, doubt="it is no layer's weight, so it may be no matrix")
    # By name, as transformers may be missing; FSDP2 makes sub-classes of what it shards.
    if any(kind.__name__ == "Conv1D" for kind in type(module).__mro__) and hasattr(module, "nf"):
        hidden = dataclasses.replace(hidden, transposed=True)
    rows, columns = (p.shape[1], p.shape[0]) if hidden.transposed else p.shape[:2]
    if isinstance(module, nn.MultiheadAttention) and place.name == "in_proj_weight":
        hidden = _fused(hidden, (rows // 3,) * 3, module.num_heads)
    elif place.leaf.lower() in FUSED_NAMES:
        hidden = _named_fused(hidden, place.path, rows, columns, place.parent)
    elif place.leaf in INTERLEAVED_NAMES:
        doubt = "how it mixes query, key and value is unknown, so it stays one matrix"
        hidden = dataclasses.replace(hidden, doubt=doubt)
    elif place.leaf in QUERY_KEY_NAMES:
        hidden = dataclasses.replace(hidden, heads=_heads(place.leaf, rows, place.parent) or 0)
    return hidden


def _named_fused(
    hidden: NamedRole, path: str, rows: int, columns: int, parent: nn.Module | None
) -> NamedRole:
    size = _attribute(parent, "head_dim", "head_size")
    heads = _attribute(parent, *HEAD_COUNTS)
    if rows == 3 * columns:
        return _fused(hidden, (columns,) * 3, heads)
    if heads and size and (rows - heads * size) % 2 == 0 and rows > heads * size:
        rest = (rows - heads * size) // 2
        return _fused(hidden, (heads * size, rest, rest), heads)
    return dataclasses.replace(
        hidden,
        heads=0,
        doubt=f"{path} sounds like query, key and value in one, but their sizes are unknown, so it "
        "stays one matrix",
    )


def _fused(hidden: NamedRole, split: tuple[int, ...], heads: int | None) -> NamedRole:
    reason = f"{hidden.reason}: query, key and value, {', '.join(map(str, split))} rows"
    return dataclasses.replace(hidden, split=split, heads=heads or 0, reason=reason)


def _heads(leaf: str, rows: int, parent: nn.Module | None) -> int | None:
    """Return the number of heads in the rows of a query or key matrix, if the module tells."""
    if (size := _attribute(parent, "head_dim", "head_size", "attention_head_size")) is not None:
        return rows // size if rows % size == 0 else None
    key = "k" in leaf
    names = ("num_key_value_heads", "num_kv_heads") if key else ()
    return _attribute(parent, *names, *HEAD_COUNTS)


def _attribute(module: nn.Module | None, *names: str) -> int | None:
    sources: list[Any] = [module, getattr(module, "config", None)]
    for source in sources:
        for name in names:
            if isinstance(value := getattr(source, name, None), int) and value > 0:
                return value
    return None


def check_split(split: object) -> None:
    """Raise UserError unless `split` is None or a sequence of positive whole numbers."""
    if split is None:
        return
    if not isinstance(split, (tuple, list)) or not all(type(n) is int and n > 0 for n in split):
        raise UserError(
            f"split is {split!r}; it must be the rows of each block, such as (8, 8, 8)."
        )
