"""Causal softmax attention over whole sequences or over the documents packed into them."""

from __future__ import annotations

import importlib.util
import warnings
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask

from steepest import compiler
from steepest.models import document_attention, flex_attention
from steepest.models import documents as packed

Mask = Tensor | BlockMask
"""What tokens of packed documents see, as `document_mask` returns it for `attend`."""

DENSE_LENGTH = 256
"""Rows up to this length have a mask of all pairs, which costs little there. In longer ones a CPU
is slower with it, except for documents of a token or two (benchmarks/packed_attention.py)."""


def kernel(device_type: str, time: int, head_size: int) -> Literal["dense", "document", "flex"]:
    """Return which kernel attends to packed documents in rows of so many tokens.

    dense     A mask of all pairs, time x time, which on a GPU also excludes the flash kernel.
    document  On a CPU: the flash kernel, document by document.
    flex      On a GPU: FlexAttention, in any dtype. torch.nn.attention.varlen is for half precision
              alone, and must know on the host how many documents there are, which the host would
              have to wait for.
    """
    if time <= DENSE_LENGTH:
        return "dense"
    if device_type == "cpu":
        return "document"
    fits = device_type == "cuda" and head_size >= flex_attention.SMALLEST_HEAD
    return "flex" if fits and _can_compile() else "dense"


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _can_compile() -> bool:
    """Return whether kernels can be compiled for a GPU; warn if not."""
    problem = compiler.problem()
    if not importlib.util.find_spec("triton"):
        problem = "Triton is not installed."
    if problem:
        warnings.warn(
            f"{problem} Packed documents take memory by the square of the row.", stacklevel=2
        )
    return not problem


def document_mask(documents: Tensor | None, head_size: int) -> Mask | None:
    """Return what the tokens of packed documents see, None where there are none.

    It serves all layers with heads of that size. See `steepest.models.documents`.
    """
    if documents is None:
        return None
    chosen = kernel(documents.device.type, documents.shape[1], head_size)
    if chosen == "flex":
        return flex_attention.block_mask(packed.begins(documents))
    return packed.starts(documents) if chosen == "document" else packed.mask(documents)


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask | None = None, scale: float | None = None
) -> Tensor:
    """Return causal attention [batch, heads, time, head_size] in the dtype of `v`.

    Keys and values may have fewer heads, which queries then share in order. With a `mask` of
    `document_mask` each position sees its own document up to itself, instead of all up to itself.
    `scale` multiplies the scores, 1 / sqrt(head_size) if not given.
    """
    with torch.autocast(v.device.type, enabled=False):
        if isinstance(mask, BlockMask):
            return flex_attention.attend(q.to(v.dtype), k.to(v.dtype), v, mask, scale)
        if mask is not None and mask.ndim == 2:
            return document_attention.attend(q.to(v.dtype), k.to(v.dtype), v, mask, scale)
        short = q.shape[2] <= document_attention.FLOAT32_LENGTH
        dtype = torch.float32 if v.device.type == "cpu" and short else v.dtype
        y = F.scaled_dot_product_attention(
            q.to(dtype),
            k.to(dtype),
            v.to(dtype),
            attn_mask=mask,
            is_causal=mask is None,
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
    return y.to(v.dtype)
