"""The Triton kernels of flash-linear-attention, where it is installed and the GPU can run them."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from steepest.models.documents import starts

ARGUMENTS = {
    "chunk_gla": ("q", "k", "v", "g"),
    "chunk_delta_rule": ("q", "k", "v", "beta"),
    "chunk_gated_delta_rule": ("q", "k", "v", "g", "beta"),
}
"""The kernels used, and what they take; g is the logarithm of the decay."""
LARGEST_KEY = 256
"""Channels of a key that the kernels of the delta rule take at most."""


def serves(k: Tensor, v: Tensor) -> bool:
    """Return whether `attend` can take these keys and values here."""
    return _suits(k, v) and installed()


def _suits(k: Tensor, v: Tensor) -> bool:
    """Return whether the kernels, most of all those of the delta rule, run on such tensors."""
    half = v.dtype in (torch.bfloat16, torch.float16)
    return v.is_cuda and half and k.shape[-1] <= LARGEST_KEY


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def installed() -> bool:
    """Return whether the kernels can be imported, which also takes triton."""
    return operators() is not None


@functools.cache
def operators() -> ModuleType | None:
    """Return fla.ops, None where it can't be imported."""
    try:
        return importlib.import_module("fla.ops")
    except ImportError:
        return None


def attend(kernel: str, inputs: list[Tensor], segments: Tensor | None) -> Tensor:
    """Return a recurrence of `steepest.models.recurrences`, by the kernel of that name.

    `inputs` are those of ARGUMENTS. torch.compile can't look into a kernel, so it gets an operator.
    """
    run = _operator if torch.compiler.is_compiling() else _run
    return run(kernel, inputs, segments)


def _run(kernel: str, inputs: list[Tensor], segments: Tensor | None) -> Tensor:
    function = getattr(operators(), kernel)
    v = inputs[2]
    borders = None
    if segments is not None:
        # All documents of the batch one after the other, as one sequence with borders.
        borders = _borders(segments)
        inputs = [x.flatten(0, 1)[None] for x in inputs]
    output: Tensor
    output, _ = function(**dict(zip(ARGUMENTS[kernel], inputs, strict=True)), cu_seqlens=borders)
    return output.reshape(v.shape).to(v.dtype)


def _borders(segments: Tensor) -> Tensor:
    """Return int64 [documents + 1]: where each begins in the flattened batch, and the end."""
    first = starts(segments).flatten().nonzero().flatten()
    return torch.cat((first, first.new_tensor([segments.numel()])))


@torch.library.custom_op("steepest::flash_linear_attention", mutates_args=())
def _operator(kernel: str, inputs: list[Tensor], segments: Tensor | None) -> Tensor:
    return _run(kernel, inputs, segments).contiguous()


@_operator.register_fake
def _(kernel: str, inputs: list[Tensor], segments: Tensor | None) -> Tensor:
    return inputs[2].new_empty(inputs[2].shape)


@torch.library.custom_op("steepest::flash_linear_attention_gradients", mutates_args=())
def _gradients(
    grad: Tensor, kernel: str, inputs: list[Tensor], segments: Tensor | None
) -> list[Tensor]:
    # An operator runs below autograd, which leaving inference mode brings back. The forward pass is
    # repeated because what the kernel keeps for its backward pass can't leave an operator.
    with torch.inference_mode(False), torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in inputs]
        found = torch.autograd.grad(_run(kernel, leaves, segments), leaves, grad)
    return [x.contiguous() for x in found]


@_gradients.register_fake
def _(grad: Tensor, kernel: str, inputs: list[Tensor], segments: Tensor | None) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in inputs]


def _keep(ctx: Any, inputs: tuple[str, list[Tensor], Tensor | None], output: Tensor) -> None:
    ctx.kernel, tensors, segments = inputs
    ctx.save_for_backward(*tensors, segments)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[None, list[Tensor], None]:
    *tensors, segments = ctx.saved_tensors
    return None, _gradients(grad, ctx.kernel, tensors, segments), None


_operator.register_autograd(_differentiate, setup_context=_keep)
