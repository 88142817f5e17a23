"""Adam and its family."""

from __future__ import annotations

from typing import Any

import adabelief_pytorch
import optimi
import pytorch_optimizer
import torch
from harness import Case, Oracle
from torch import Tensor

from cases.sgd_sign import ANY, COUPLED, decoupled

SHORT = {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-6}

CASES = [
    Case("adam", {"lr": 3e-3}),
    Case("adam", {**SHORT, "amsgrad": True}, "amsgrad"),
    Case("adamw", {"lr": 3e-3}),
    Case("adamw", SHORT, "0.8 0.95"),
    Case("adamw", {**SHORT, "amsgrad": True}, "amsgrad"),
    Case("nadam"),
    Case("nadam", {**SHORT, "momentum_decay": 0.5}, "0.8 0.95"),
    Case("nadam", {**SHORT, "momentum_decay": 0.0}, "no schedule"),
    Case("nadamw"),
    Case("nadamw", {**SHORT, "momentum_decay": 0.5}, "0.8 0.95"),
    Case("nadamw", {**SHORT, "momentum_decay": 0.0}, "no schedule"),
    Case("adagrad"),
    Case("adagrad", {"lr": 3e-2, "eps": 1e-4, "initial_accumulator": 0.1}, "from 0.1"),
    Case("adagrad_norm"),
    Case("adagrad_norm", {"lr": 0.3, "initial_accumulator": 1.0}, "from 1"),
    Case("rmsprop", {"lr": 1e-3}),
    Case("rmsprop", {"lr": 1e-3, "alpha": 0.9, "momentum": 0.9, "eps": 1e-5}, "momentum"),
    Case("rmsprop", {"lr": 1e-3, "momentum": 0.9, "eps": 1e-4, "centered": True}, "centered"),
    Case("radam"),
    Case("radam", SHORT, "0.8 0.95"),
    Case("adabelief"),
    Case("adabelief", SHORT, "0.8 0.95"),
    Case("adabelief", {"rectify": True}, "rectified"),
    Case("laprop"),
    Case("laprop", SHORT, "0.8 0.95"),
    Case("diffgrad"),
    Case("diffgrad", SHORT, "0.8 0.95"),
]


def nadamw(params: list[Tensor], **options: Any) -> torch.optim.Optimizer:
    return torch.optim.NAdam(params, decoupled_weight_decay=True, **options)


def nadamw_at_the_limit(
    params: list[Tensor], *, momentum_decay: float, **options: Any
) -> torch.optim.Optimizer:
    assert momentum_decay == 0
    return nadamw(params, momentum_decay=1e6, **options)


def adagrad(
    params: list[Tensor], *, initial_accumulator: float, **options: Any
) -> torch.optim.Optimizer:
    return decoupled(torch.optim.Adagrad)(
        params, initial_accumulator_value=initial_accumulator, **options
    )


def radam(params: list[Tensor], **options: Any) -> torch.optim.Optimizer:
    return torch.optim.RAdam(params, decoupled_weight_decay=True, **options)


def radam_of_pytorch_optimizer(params: list[Tensor], **options: Any) -> torch.optim.Optimizer:
    return pytorch_optimizer.RAdam(params, degenerated_to_sgd=True, **options)


def radam_of_optimi(params: list[Tensor], **options: Any) -> torch.optim.Optimizer:
    return optimi.RAdam(params, decouple_wd=True, triton=False, **options)


def adabelief(params: list[Tensor], **options: Any) -> torch.optim.Optimizer:
    return adabelief_pytorch.AdaBelief(params, print_change_log=False, **options)


PRODUCT = "torch keeps the product of mu in float32"

ORACLES = [
    Oracle("adam", "torch", torch.optim.Adam, ANY, {"lr": 3e-3}),
    Oracle("adam", "torch", torch.optim.Adam, ANY, {**SHORT, "amsgrad": True}, label="amsgrad"),
    Oracle("adamw", "torch", torch.optim.AdamW, ANY, {"lr": 3e-3}),
    Oracle("adamw", "torch", torch.optim.AdamW, ANY, SHORT, label="0.8 0.95"),
    Oracle("adamw", "torch", torch.optim.AdamW, ANY, {**SHORT, "amsgrad": True}, label="amsgrad"),
    Oracle(
        "nadam",
        "torch",
        torch.optim.NAdam,
        ANY,
        {**SHORT, "momentum_decay": 4e-3},
        tolerance64=1e-8,
        difference=PRODUCT,
    ),
    Oracle(
        "nadamw",
        "torch",
        nadamw,
        ANY,
        {**SHORT, "momentum_decay": 0.5},
        tolerance64=1e-8,
        difference=f"decoupled_weight_decay=True; {PRODUCT}",
    ),
    Oracle(
        "nadamw",
        "torch",
        nadamw_at_the_limit,
        ANY,
        {"lr": 3e-3, "momentum_decay": 0.0},
        tolerance64=1e-6,
        label="no schedule",
        difference=f"momentum_decay was 1e6 there; decoupled_weight_decay=True; {PRODUCT}",
    ),
    Oracle(
        "adagrad",
        "torch",
        adagrad,
        ANY,
        {"lr": 3e-2, "eps": 1e-6, "initial_accumulator": 0.1},
        difference=COUPLED,
    ),
    Oracle(
        "rmsprop",
        "torch",
        decoupled(torch.optim.RMSprop),
        ANY,
        {"lr": 1e-3, "alpha": 0.9, "momentum": 0.9},
        difference=COUPLED,
    ),
    Oracle(
        "rmsprop",
        "torch",
        decoupled(torch.optim.RMSprop),
        ANY,
        {"lr": 1e-3, "centered": True, "eps": 1e-4},
        label="centered",
        difference=COUPLED,
    ),
    Oracle("radam", "torch", radam, ANY, {"lr": 3e-3}, difference="decoupled_weight_decay=True"),
    Oracle(
        "radam",
        "pytorch-optimizer",
        radam_of_pytorch_optimizer,
        ANY,
        SHORT,
        difference="degenerated_to_sgd=True: it moves nothing at first otherwise",
    ),
    Oracle(
        "radam",
        "torch-optimi",
        radam_of_optimi,
        ANY,
        {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 0.0},
        difference="decouple_wd=True; eps was 0, as it is added to the bias-corrected root",
    ),
    Oracle("adabelief", "adabelief-pytorch", adabelief, ANY, {"lr": 3e-3, "rectify": False}),
    Oracle(
        "adabelief",
        "adabelief-pytorch",
        adabelief,
        ANY,
        {**SHORT, "rectify": True},
        label="rectified",
    ),
    Oracle("adabelief", "pytorch-optimizer", pytorch_optimizer.AdaBelief, ANY, {"lr": 3e-3}),
    Oracle(
        "laprop",
        "pytorch-optimizer",
        pytorch_optimizer.LaProp,
        ANY,
        {"lr": 3e-3, "betas": (0.8, 0.95), "weight_decay": 0.0},
        schedule=False,
        tolerance64=1e-7,
        difference="its learning rate is inside m, so it was constant; it decays weights after the "
        "step, so there was no decay; it keeps the average learning rate in float32",
    ),
    Oracle(
        "diffgrad",
        "pytorch-optimizer",
        pytorch_optimizer.DiffGrad,
        ANY,
        {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 0.0},
        tolerance64=1e-8,
        difference="eps was 0, as its root is not bias-corrected before eps is added; it has 1e-15 "
        "inside the root",
    ),
]
