"""Methods that find their learning rate, or need no schedule of it."""

from __future__ import annotations

from typing import Any

import prodigyopt
import schedulefree
from harness import Case, Oracle
from torch import Tensor

from cases.sgd_sign import ANY

SLOW = (
    "x0 - x is rounded to the precision of x, while from d0 = 1e-6 the first moves are of its size"
)
FAST = {"d0": 1e-3, "growth_rate": 1.5}

CASES = [
    Case("prodigy", tolerance32=2e-3, reason=SLOW),
    Case("prodigy", FAST, "d0 1e-3"),
    Case(
        "prodigy",
        {"d0": 1e-2, "bias_correction": True, "d_coef": 0.5, "betas": (0.8, 0.99), "eps": 1e-5},
        "bias_correction",
    ),
    Case("prodigy", {**FAST, "safeguard_warmup": True, "beta3": 0.9}, "safeguard_warmup"),
    Case("schedulefree_adamw"),
    Case(
        "schedulefree_adamw",
        {"betas": (0.8, 0.95), "eps": 1e-4, "warmup_steps": 7, "r": 1.5, "weight_lr_power": 1.0},
        "warmup_steps",
    ),
    Case("schedulefree_adamw", {"weight_lr_power": 0.0}, "weight_lr_power 0"),
    Case("schedulefree_sgd", {"lr": 0.05}),
    Case(
        "schedulefree_sgd",
        {"lr": 0.05, "momentum": 0.6, "warmup_steps": 7, "r": 1.5, "weight_lr_power": 1.0},
        "warmup_steps",
    ),
]


def prodigy(params: list[Tensor], bias_correction: bool = False, **options: Any) -> Any:
    return prodigyopt.Prodigy(params, use_bias_correction=bias_correction, **options)


def training(kind: Any) -> Any:
    def make(params: list[Tensor], **options: Any) -> Any:
        optimizer = kind(params, **options)
        optimizer.train()
        return optimizer

    return make


SHARES = {"warmup_steps": 7, "r": 1.5, "weight_lr_power": 1.0}

ORACLES = [
    Oracle("prodigy", "prodigyopt", prodigy, ANY, FAST),
    Oracle(
        "prodigy",
        "prodigyopt",
        prodigy,
        ANY,
        {"d0": 1e-2, "bias_correction": True},
        label="bias_correction",
    ),
    Oracle(
        "prodigy",
        "prodigyopt",
        prodigy,
        ANY,
        {**FAST, "safeguard_warmup": True, "beta3": 0.9, "d_coef": 0.5},
        label="safeguard_warmup",
    ),
    *(
        Oracle(
            "schedulefree_adamw",
            "schedulefree",
            training(schedulefree.AdamWScheduleFree),
            ANY,
            hyper,
            label=" ".join(hyper),
        )
        for hyper in ({}, SHARES, {"weight_lr_power": 0.0})
    ),
    *(
        Oracle(
            "schedulefree_sgd",
            "schedulefree",
            training(schedulefree.SGDScheduleFree),
            ANY,
            {"lr": 0.05, **hyper},
            label=" ".join(hyper),
        )
        for hyper in ({}, SHARES)
    ),
]
