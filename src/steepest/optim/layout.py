"""How the values of a matrix lie in its tensor: in blocks, transposed, stacked, by head."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from torch import nn

from steepest.optim.structure import Place, attribute, kinds

FUSED_NAMES = frozenset({"c_attn", "qkv", "qkv_proj", "wqkv", "to_qkv"})
"""Layers that hold query, key and value one after the other."""
INTERLEAVED_NAMES = frozenset({"query_key_value"})
"""Layers that mix them in an order that differs between models."""
INTERLEAVED_KINDS = frozenset(
    {"CodeGenAttention", "GPTBigCodeAttention", "MiniMaxLightningAttention"}
)
"""Modules of transformers whose layers mix them in spite of their names."""
QUERY_KEY_NAMES = frozenset({"q_proj", "k_proj", "wq", "wk", "query", "key", "to_q", "to_k"})

HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads")
"""Attributes that give the number of attention heads."""
KEY_HEAD_COUNTS = ("num_key_value_heads", "num_kv_heads")
HEAD_SIZES = ("head_dim", "head_size")
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "n_experts", "experts")

ROUTER = re.compile(r"router|gate")
"""Name, within a mixture of experts, of the matrix with a row for each routed expert."""
FROM_HIDDEN = frozenset({"up", "gate", "in", "w1", "w3", "wi", "fc1", "c_fc"})
TO_HIDDEN = frozenset({"down", "out", "w2", "wo", "fc2", "c_proj"})
"""Names of expert matrices, or parts of them between underscores, that begin or end at hidden
states."""


@dataclass(frozen=True)
class Layout:
    """How a matrix lies in its tensor; the fields are those of `NamedRole`."""

    reason: str
    split: tuple[int, ...] | None = None
    transposed: bool = False
    bank: bool = False
    heads: int | None = None
    doubt: str = ""


def layout(place: Place) -> Layout:
    """Return how a hidden matrix, or a stack of them, lies in its tensor."""
    convolution = isinstance(place.module, nn.modules.conv._ConvNd)
    if place.parameter.ndim == 3 and not convolution:
        return _bank(place)
    plain = Layout(f"matrix of a {place.kind}", transposed=place.transposed)
    if not place.is_weight:
        stacks = any(p.ndim == 3 for p in place.module.parameters())
        if stacks and ROUTER.search(place.name):
            return replace(plain, reason=f"router of a {place.kind}")
        return replace(plain, doubt="it is no layer's weight, so it may be no matrix")
    return _attention(place, plain)


def _attention(place: Place, plain: Layout) -> Layout:
    """Return the layout of a matrix, with what is known of it if it makes queries or keys."""
    module, parent = place.module, place.parent
    rows, columns = place.sides
    if isinstance(module, nn.MultiheadAttention) and place.name == "in_proj_weight":
        return _fused(plain, (rows // 3,) * 3, module.num_heads)
    mixed = kinds(parent) & INTERLEAVED_KINDS and not getattr(parent, "multi_query", False)
    if place.leaf in INTERLEAVED_NAMES or (mixed and place.leaf in FUSED_NAMES):
        doubt = "how it mixes query, key and value is unknown, so it stays one matrix"
        return replace(plain, doubt=doubt)
    if place.leaf in FUSED_NAMES:
        return _named_fused(plain, place.path, rows, columns, parent)
    if place.leaf in QUERY_KEY_NAMES:
        return replace(plain, heads=_heads(place.leaf, rows, parent) or 0)
    return plain


def _bank(place: Place) -> Layout:
    """Return the layout of a tensor of three dimensions: a stack of matrices, if something tells.

    That is a number of experts or heads, a router with a row for each, or the mark of transformers.
    """
    p, module = place.parameter, place.module
    bank = Layout(f"{p.shape[0]} matrices of a {place.kind}", bank=True)
    # transformers marks experts, True for those that are stored [count, in, out].
    if isinstance(marked := getattr(module, "is_transposed", None), bool):
        return replace(bank, transposed=marked)
    router = _router(place)
    counts = {attribute(EXPERT_COUNTS, module), attribute(EXPERT_COUNTS, place.parent)}
    counts |= {attribute(HEAD_COUNTS, module), None if router is None else router.shape[0]}
    if p.shape[0] not in counts:
        return replace(bank, doubt="nothing tells that it is a stack of matrices")
    turned = None if router is None else _turned(place, router.shape[1])
    if turned is None and not place.is_weight and p.shape[1] != p.shape[2]:
        doubt = "whether its matrices are stored [out, in] or [in, out] is unknown"
        return replace(bank, doubt=doubt)
    return replace(bank, transposed=turned is True)


def _router(place: Place) -> nn.Parameter | None:
    """Return the router of a stack: a row for each matrix but those that are always on."""
    for scope in (place.module, place.parent):
        for name, p in () if scope is None else scope.named_parameters():
            named = ROUTER.search(name) and not name.endswith("bias")
            if named and p.ndim == 2 and p.shape[0] <= place.parameter.shape[0]:
                return p
    return None


def _turned(place: Place, hidden_size: int) -> bool | None:
    """Say whether expert matrices are stored [in, out], None where their sides do not tell."""
    names = {place.name, *place.name.split("_")}
    known = [table for table in (FROM_HIDDEN, TO_HIDDEN) if names & table]
    sides = tuple(place.parameter.shape[1:])
    if len(known) != 1 or sides.count(hidden_size) != 1:
        return None
    return (sides[0] == hidden_size) is (known[0] is FROM_HIDDEN)


def _named_fused(
    plain: Layout, path: str, rows: int, columns: int, parent: nn.Module | None
) -> Layout:
    size, heads = attribute(HEAD_SIZES, parent), attribute(HEAD_COUNTS, parent)
    if rows == 3 * columns:
        return _fused(plain, (columns,) * 3, heads)
    if heads and size and (rows - heads * size) % 2 == 0 and rows > heads * size:
        rest = (rows - heads * size) // 2
        return _fused(plain, (heads * size, rest, rest), heads)
    return replace(
        plain,
        heads=0,
        doubt=f"{path} sounds like query, key and value in one, but their sizes are unknown, so it "
        "stays one matrix",
    )


def _fused(plain: Layout, split: tuple[int, ...], heads: int | None) -> Layout:
    reason = f"{plain.reason}: query, key and value, {', '.join(map(str, split))} rows"
    return replace(plain, split=split, heads=heads or 0, reason=reason)


def _heads(leaf: str, rows: int, parent: nn.Module | None) -> int | None:
    """Return the number of heads in the rows of a query or key matrix, if the module tells."""
    if (size := attribute((*HEAD_SIZES, "attention_head_size"), parent)) is not None:
        return rows // size if rows % size == 0 else None
    return attribute((*(KEY_HEAD_COUNTS if "k" in leaf else ()), *HEAD_COUNTS), parent)
