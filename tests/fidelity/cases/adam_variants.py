"""Variants of Adam."""

from __future__ import annotations

from typing import Any

import adamp
import optimi
import pytorch_optimizer
import torch
from harness import Case, Oracle
from torch import Tensor

from cases.adam import SHORT
from cases.sgd_sign import ANY

CASES = [
    Case("adamp"),
    Case("adamp", {**SHORT, "delta": 0.5, "wd_ratio": 0.5}, "delta 0.5"),
    Case("adamp", {**SHORT, "delta": 5.0, "nesterov": True}, "all projected, nesterov"),
    Case("adan"),
    Case("adan", {"lr": 3e-3, "betas": (0.9, 0.8, 0.95), "eps": 1e-6}, "0.9 0.8 0.95"),
    Case("adopt"),
    Case("adopt", {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-2}, "0.8 0.95"),
    Case("ademamix"),
    Case(
        "ademamix",
        {"betas": (0.8, 0.95, 0.99), "eps": 1e-6, "alpha_warmup": 40, "beta3_warmup": 20},
        "warm-ups",
    ),
    Case(
        "ademamix",
        {"betas": (0.0, 0.95, 0.99), "alpha": 8.0, "beta3_warmup": 50},
        "no fast momentum",
    ),
    Case("lamb"),
    Case("lamb", SHORT, "0.8 0.95"),
    Case("novograd"),
    Case("novograd", {"lr": 3e-3, "betas": (0.8, 0.5), "eps": 1e-4}, "0.8 0.5"),
    Case("exadam"),
    Case("exadam", SHORT, "0.8 0.95"),
    Case("scaled_adam"),
    Case(
        "scaled_adam",
        {**SHORT, "scale_lr": 0.5, "min_rms": 0.15, "max_rms": 0.45},
        "within 0.15 and 0.45",
    ),
    Case("stable_spam"),
    Case(
        "stable_spam",
        {**SHORT, "gammas": (0.5, 0.8, 0.9), "reset_interval": 7},
        "reset every 7 steps",
    ),
    Case("stable_spam", {"lr": 3e-3, "reset_interval": 0}, "no reset"),
]


def adan_of_optimi(params: list[Tensor], **options: Any) -> torch.optim.Optimizer:
    return optimi.Adan(params, triton=False, **options)


def ademamix(
    params: list[Tensor],
    *,
    alpha_warmup: float | None = None,
    beta3_warmup: float | None = None,
    **options: Any,
) -> torch.optim.Optimizer:
    assert alpha_warmup == beta3_warmup
    return pytorch_optimizer.AdEMAMix(
        params, t_alpha_beta3=alpha_warmup, weight_decouple=True, **options
    )


def novograd(params: list[Tensor], **options: Any) -> torch.optim.Optimizer:
    return pytorch_optimizer.NovoGrad(params, weight_decouple=False, **options)


def stable_spam(
    params: list[Tensor], *, reset_interval: int, **options: Any
) -> torch.optim.Optimizer:
    return pytorch_optimizer.StableSPAM(params, update_proj_gap=reset_interval, **options)


ORACLES = [
    Oracle("adamp", "adamp", adamp.AdamP, ANY, {"lr": 3e-3}),
    Oracle(
        "adamp",
        "adamp",
        adamp.AdamP,
        ANY,
        {**SHORT, "delta": 0.5, "wd_ratio": 0.5, "nesterov": True},
        label="delta 0.5, nesterov",
    ),
    Oracle("adan", "torch-optimi", adan_of_optimi, ANY, {"lr": 3e-3, "eps": 1e-8}),
    Oracle(
        "adan",
        "torch-optimi",
        adan_of_optimi,
        ANY,
        {"lr": 3e-3, "betas": (0.9, 0.8, 0.95), "eps": 1e-6},
        label="0.9 0.8 0.95",
    ),
    Oracle("adan", "pytorch-optimizer", pytorch_optimizer.Adan, ANY, {"lr": 3e-3}),
    Oracle(
        "ademamix",
        "pytorch-optimizer",
        ademamix,
        ANY,
        {"lr": 3e-3, "alpha": 2.0},
        difference="weight_decouple=True",
    ),
    Oracle(
        "ademamix",
        "pytorch-optimizer",
        ademamix,
        ANY,
        {"betas": (0.8, 0.95, 0.99), "alpha": 8.0, "alpha_warmup": 20, "beta3_warmup": 20},
        label="warm-ups",
        difference="weight_decouple=True; it has one warm-up for both",
    ),
    Oracle(
        "novograd",
        "pytorch-optimizer",
        novograd,
        ANY,
        {"lr": 1e-3},
        difference="weight_decouple=False",
    ),
    Oracle("exadam", "pytorch-optimizer", pytorch_optimizer.EXAdam, ANY, {"lr": 1e-3}),
    Oracle(
        "stable_spam", "pytorch-optimizer", stable_spam, ANY, {"lr": 1e-3, "reset_interval": 1000}
    ),
    Oracle(
        "stable_spam",
        "pytorch-optimizer",
        stable_spam,
        ANY,
        {**SHORT, "reset_interval": 7},
        label="reset every 7 steps",
    ),
]
