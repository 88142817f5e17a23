"""Methods with little state."""

from __future__ import annotations

from typing import Any

import pytorch_optimizer
from harness import Case, Oracle
from torch import Tensor

from cases.sgd_sign import ANY

CASES = [
    Case("adafactor", {"lr": 1e-2}),
    Case(
        "adafactor",
        {"lr": 1e-2, "beta1": 0.9, "decay_rate": 0.7, "clip_threshold": 0.5},
        "beta1",
    ),
]


def adafactor(params: list[Tensor], beta1: float | None = None, **options: Any) -> Any:
    # Beyond names: it keeps the moment in bfloat16 and scales lr by the parameter unless told.
    return pytorch_optimizer.AdaFactor(
        params,
        betas=(beta1, 0.9999999),
        scale_parameter=False,
        relative_step=False,
        momentum_dtype=params[0].dtype,
        **options,
    )


ORACLES = [
    Oracle(
        "adafactor",
        "pytorch-optimizer",
        adafactor,
        ANY,
        {"lr": 1e-2},
        tolerance64=1e-9,
        difference="its scale_parameter and relative_step were turned off",
    ),
    Oracle(
        "adafactor",
        "pytorch-optimizer",
        adafactor,
        ANY,
        {"lr": 1e-2, "beta1": 0.9},
        tolerance64=1e-9,
        schedule=False,
        label="beta1",
        difference="its moment holds lr: the same at a constant rate",
    ),
]
