"""MARS."""

from __future__ import annotations

from typing import Any

import pytorch_optimizer
import torch
from harness import Case, Oracle
from torch import Tensor

from cases.sgd_sign import MATRICES

CASES = [
    Case("mars_adamw"),
    Case(
        "mars_adamw",
        {"betas": (0.8, 0.95), "eps": 1e-6, "gamma": 0.1, "adam_betas": (0.8, 0.99)},
        "0.8 0.95",
    ),
    Case("mars_adamw", {"exact": True}, "exact"),
    Case("mars_lion", {"lr": 1e-3}),
    Case("mars_lion", {"lr": 1e-3, "momentum": 0.8, "gamma": 0.1}, "0.8"),
    Case("mars_lion", {"lr": 1e-3, "exact": True}, "exact"),
    Case("mars_shampoo"),
    Case("mars_shampoo", {"momentum": 0.8, "gamma": 0.1, "ns_steps": 3}, "0.8"),
    Case("mars_shampoo", {"exact": True}, "exact"),
]


def mars_adamw(params: list[Tensor], **options: Any) -> torch.optim.Optimizer:
    return pytorch_optimizer.MARS(params, mars_type="adamw", **options)


def mars_lion(params: list[Tensor], *, momentum: float, **options: Any) -> torch.optim.Optimizer:
    return pytorch_optimizer.MARS(params, mars_type="lion", betas=(momentum, 0.99), **options)


ORACLES = [
    Oracle(
        "mars_adamw",
        "pytorch-optimizer",
        mars_adamw,
        MATRICES,
        {"lr": 3e-3, "eps": 0.0},
        tolerance64=1e-7,
        role="hidden",
        difference="eps was 0: it is added before the second bias correction; v has 1e-15 more",
    ),
    Oracle(
        "mars_lion",
        "pytorch-optimizer",
        mars_lion,
        MATRICES,
        {"lr": 1e-3, "momentum": 0.9, "gamma": 0.05},
        role="hidden",
    ),
]
