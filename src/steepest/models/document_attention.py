"""Causal attention of packed documents on a CPU: each document by a call of the flash kernel.

Time and memory are those of the documents alone: nothing is as large as time x time. Where they lie
is known from values, so torch.compile and fake tensors get an operator.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

FLOAT32_LENGTH = 256
"""Up to this length the CPU kernel is faster in float32 than in bfloat16, most of all backward (5
times at 128 positions and heads of 16); at 512 it is slower."""

HALF = (torch.bfloat16, torch.float16)
FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def attend(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, scale: float | None) -> Tensor:
    """Return causal attention within documents, [batch, heads, time, head_size], of one dtype.

    `starts`, bool [batch, time], says which tokens are the first of their document, the first one
    of a row always. Keys and values may have fewer heads.
    """
    output: Tensor = _forward(q, k, v, starts, scale)[0]
    return output


@torch.library.custom_op("steepest::document_attention", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, scale: float | None
) -> tuple[Tensor, Tensor]:
    output, logsumexp = _outputs(q)
    for place, dtype in _documents(starts, q.dtype):
        inputs = (x[place].to(dtype).contiguous() for x in (q, k, v))
        output[place], logsumexp[place] = FORWARD(*inputs, 0.0, True, scale=scale)
    return output, logsumexp


@_forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, scale: float | None
) -> tuple[Tensor, Tensor]:
    return _outputs(q)


@torch.library.custom_op("steepest::document_attention_gradients", mutates_args=())
def _gradients(
    tensors: list[Tensor], logsumexp: Tensor, starts: Tensor, scale: float | None
) -> list[Tensor]:
    """Return the gradients of q, k and v for [that of the output, q, k, v, output]."""
    gradients = [_like(x) for x in tensors[1:4]]
    for place, dtype in _documents(starts, tensors[1].dtype):
        parts = (x[place].to(dtype).contiguous() for x in tensors)
        found = BACKWARD(*parts, logsumexp[place], 0.0, True, scale=scale)
        for whole, part in zip(gradients, found, strict=True):
            whole[place] = part
    return gradients


@_gradients.register_fake
def _(
    tensors: list[Tensor], logsumexp: Tensor, starts: Tensor, scale: float | None
) -> list[Tensor]:
    return [_like(x) for x in tensors[1:4]]


def _documents(
    starts: Tensor, dtype: torch.dtype
) -> Iterator[tuple[tuple[slice, slice, slice], torch.dtype]]:
    """Yield where each document lies in [batch, heads, time], and what to compute it in."""
    time = starts.shape[1]
    borders = [*starts.flatten().nonzero().flatten().tolist(), starts.numel()]
    for begin, end in itertools.pairwise(borders):
        row, first = divmod(begin, time)
        length = end - begin
        place = slice(row, row + 1), slice(None), slice(first, first + length)
        yield place, torch.float32 if dtype in HALF and length <= FLOAT32_LENGTH else dtype


def _outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    """Return room for the outputs, and for the logarithms of the sums of exponentials."""
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    return _like(q), q.new_empty(q.shape[:3], dtype=exact)


def _like(x: Tensor) -> Tensor:
    """Return room for [batch, heads, time, head_size] in which the heads of a token are together.

    So the projections before and after attention need no copy.
    """
    batch, heads, time, size = x.shape
    return x.new_empty(batch, time, heads, size).transpose(1, 2)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)


def _differentiate(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
    q, k, v, starts, output, logsumexp = ctx.saved_tensors
    tensors = [grad, q, k, v, output]
    for_q, for_k, for_v = _gradients(tensors, logsumexp, starts, ctx.scale)
    return for_q, for_k, for_v, None, None


_forward.register_autograd(_differentiate, setup_context=_keep)
