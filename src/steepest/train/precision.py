"""Numbers: in which dtype a run keeps weights and computes, and how it rounds updates."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch

Precision = Literal[
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


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Return the context of a forward pass: bfloat16 autocast, or nothing."""
    if precision == "bfloat16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


def weight_dtype(precision: str) -> torch.dtype:
    """Return the dtype that weights and gradients are kept in."""
    return torch.bfloat16 if precision.startswith("pure_bfloat16") else torch.float32
