"""Numbers: in which dtype a run keeps weights and computes, and how it rounds updates."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from torch import Tensor

from steepest.optim import Int8Weight

Precision = Literal[
    "auto",
    "float32",
    "bfloat16",
    "pure_bfloat16",
    "pure_bfloat16_stochastic",
    "pure_bfloat16_kahan",
]

WRAPPERS = {
    "pure_bfloat16_stochastic": ("stochastic_rounding",),
    "pure_bfloat16_kahan": ("kahan",),
}
"""How an optimizer of the catalogue is wrapped so that small updates of bfloat16 weights count."""


def on(device: torch.device, precision: Precision) -> Precision:
    """Return what a precision is on a device: auto is bfloat16 autocast on GPUs alone."""
    if precision == "auto":
        return "bfloat16" if device.type == "cuda" else "float32"
    return precision


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """Return the context of a forward pass: bfloat16 autocast, or nothing."""
    if on(device, precision) == "bfloat16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


def weight_dtype(precision: str) -> torch.dtype:
    """Return the dtype that weights and gradients are kept in."""
    return torch.bfloat16 if precision.startswith("pure_bfloat16") else torch.float32


def floats(tensor: Tensor) -> Tensor:
    """Return a tensor without gradient; one in int8 as the float32 values of its codes."""
    tensor = tensor.detach()
    return tensor.dequantize(torch.float32) if isinstance(tensor, Int8Weight) else tensor


def stored_bytes(tensor: Tensor) -> int:
    """Return the bytes that a tensor's values take, as codes if it is in int8."""
    if isinstance(tensor, Int8Weight):
        return tensor.stored_bytes()
    return tensor.numel() * tensor.element_size()


def norm(tensors: list[Tensor]) -> Tensor:
    """Return the norm of all elements of tensors of one dtype, 0-d, in float32 if that is bfloat16.

    torch.nn.utils.get_total_norm rounds that to 8 bits, as it does with the norms of the tensors.
    """
    exact = torch.promote_types(tensors[0].dtype, torch.float32)
    whole: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors, 2, exact)))
    return whole
