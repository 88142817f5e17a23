"""Roles of parameters: what a parameter is in the model, which decides the rule it gets."""

from __future__ import annotations

import dataclasses
import fnmatch
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from torch import nn

from steepest.errors import UserError, unknown
from steepest.optim.layout import layout
from steepest.optim.structure import Place, Structure

EMBEDDING_KINDS = re.compile(r"emb|position")
"""Names, in lower case, of modules that hold tables."""
EMBEDDING_NAMES = re.compile(r"emb|(^|_)pos")
"""Names, in lower case, of parameters that are tables."""


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

    The first that holds decides:

    1. Vectors: fewer than two dimensions, or sides longer than 1; biases, also stacks of them;
       gains of norms; depthwise convolution kernels, which are a filter for each channel and mix
       none (AdamW steps them where Muon is used with linear attention); A_log of a state space
       model.
    2. Embeddings: `nn.Embedding`, and what `get_input_embeddings()` of the model or of a part of it
       returns: tables of tokens, positions and token types, and a model's own patch embedding. A
       parameter that an embedding and a head share counts once, as an embedding.
    3. Heads: what `get_output_embeddings()` returns; matrices outside of the numbered layers with
       as many rows as the vocabulary, which tables and `config.vocab_size` give; a last matrix with
       `num_labels` or `num_classes` rows.
    4. Hidden: every other matrix, convolution kernels, and the router of a mixture of experts, as
       in the runs of Semenov et al. (2025, arXiv:2509.01440); `{"*.router.weight": "vector"}` gives
       it to AdamW. Fused query-key-value matrices, matrices stored [in, out] and stacks of experts
       are recognised.

    Where a name alone speaks, or the structure against it, `doubt` says so, and `create` warns.

    `override` gives the roles of parameters by name or pattern. Raises UserError for a pattern that
    matches no parameter, or an unknown role.
    """
    structure = Structure.of(model)
    found: dict[int, tuple[str, NamedRole]] = {}
    for place in structure.places:
        key, role = id(place.parameter), _role(place, structure)
        name, known = found.get(key, (place.full_name, role))
        if key in found and (role.role is not known.role or role.role is Role.EMBEDDING):
            either = {role.role, known.role}
            shared = Role.EMBEDDING if Role.EMBEDDING in either else Role.HEAD
            known = NamedRole(shared, f"shared by {name} and {place.path}")
        found[key] = (name, known)
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


def _role(place: Place, structure: Structure) -> NamedRole:
    found = _vector(place) or _embedding(place, structure)
    if found is not None:
        return found
    output = structure.output(place)
    if output.found:
        return NamedRole(Role.HEAD, output.reason, transposed=place.transposed, doubt=output.doubt)
    hidden = NamedRole(Role.HIDDEN, **vars(layout(place)))
    if hidden.doubt or hidden.heads is not None:  # Queries and keys are no output layer's.
        return hidden
    return dataclasses.replace(hidden, doubt=output.doubt or _first_doubt(place, structure))


def _vector(place: Place) -> NamedRole | None:
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
    skip = getattr(place.module, "D", None)
    if place.name == "A_log" and isinstance(skip, nn.Parameter) and skip.shape == shape[:-1]:
        return NamedRole(Role.VECTOR, "decays of each channel of a state space model")
    return _gains(place) or _depthwise(place)


def _gains(place: Place) -> NamedRole | None:
    if not place.kind.lower().endswith(("norm", "normgated")):
        return None
    known = isinstance(place.module, (nn.LayerNorm, nn.RMSNorm))
    doubt = "" if known else "only the name of its module tells that it holds gains"
    return NamedRole(Role.VECTOR, f"gains of a {place.kind}", doubt=doubt)


def _depthwise(place: Place) -> NamedRole | None:
    """Return the role of a filter for each channel, None for other kernels."""
    shape, module = place.parameter.shape, place.module
    convolution = isinstance(module, nn.modules.conv._ConvNd)
    if len(shape) < 3 or shape[0] == 1 or shape[1] != 1 or (convolution and module.groups == 1):
        return None
    named = "conv" in f"{place.kind} {place.leaf} {place.name}".lower()
    doubt = "" if named else "nothing but its shape tells that it holds a filter for each channel"
    return NamedRole(Role.VECTOR, f"a filter for each of {shape[0]} channels", doubt=doubt)


def _embedding(place: Place, structure: Structure) -> NamedRole | None:
    if place.is_table:
        return NamedRole(Role.EMBEDDING, f"weight of a {place.kind}")
    if id(place.parameter) in structure.inputs:
        return NamedRole(Role.EMBEDDING, "the model's input embeddings")
    layer = isinstance(place.module, (nn.Linear, nn.modules.conv._ConvNd)) and place.is_weight
    kind = EMBEDDING_KINDS.search(place.kind.lower()) is not None
    if layer or not (kind or EMBEDDING_NAMES.search(place.name.lower())):
        return None
    sized = kind and place.parameter.shape[0] in structure.vocabulary
    doubt = "" if sized else "only its name tells that it is an embedding"
    return NamedRole(Role.EMBEDDING, f"{place.name} of a {place.kind}", doubt=doubt)


def _first_doubt(place: Place, structure: Structure) -> str:
    """Return what speaks for a convolution's being the embedding of the input."""
    module = place.module
    if not isinstance(module, nn.modules.conv._ConvNd) or place.in_block:
        return ""
    if structure.is_first(place):
        return "it is the first layer, so it may embed the input"
    patches = module.kernel_size == module.stride and any(side > 1 for side in module.stride)
    return "it takes patches, so it may embed the input" if patches else ""


def check_split(split: object) -> None:
    """Raise UserError unless `split` is None or a sequence of positive whole numbers."""
    if split is None:
        return
    if not isinstance(split, (tuple, list)) or not all(type(n) is int and n > 0 for n in split):
        raise UserError(
            f"split is {split!r}; it must be the rows of each block, such as (8, 8, 8)."
        )
