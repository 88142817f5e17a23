"""SGD and sign methods."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lion_pytorch
import pytorch_optimizer
import torch
from harness import Case, Oracle
from torch import Tensor

MATRICES = ((8, 8), (12, 5), (5, 12), (3, 20))
ANY = (*MATRICES, (), (7,), (1, 9))

CASES = [
    Case("sgd", {"lr": 0.05}),
    Case("sgd", {"lr": 0.05, "momentum": 0.8, "nesterov": True}, "nesterov"),
    Case("sgd", {"lr": 0.2, "momentum": 0.0}, "plain"),
    Case("lars"),
    Case("lars", {"lr": 3.0, "momentum": 0.5, "trust_coefficient": 1e-2}, "0.5"),
    Case("lars", {"lr": 0.1, "momentum": 0.0, "trust_coefficient": 0.1}, "plain"),
    Case("signsgd", {"lr": 1e-3}),
    Case("signum", {"lr": 1e-3}),
    Case("signum", {"lr": 1e-3, "momentum": 0.5}, "0.5"),
    Case("signum", {"lr": 1e-3, "momentum": 0.95, "nesterov": True}, "nesterov"),
    Case("lion", {"lr": 1e-3}),
    Case("lion", {"lr": 1e-3, "betas": (0.95, 0.98)}, "0.95 0.98"),
]

COUPLED = "torch adds decay to the gradient; decay was decoupled around it"


def decoupled(kind: type[torch.optim.Optimizer]) -> Callable[..., torch.optim.Optimizer]:
    """Return what makes a torch optimizer without its decay, which would join the gradient, and
    with decay of the weights before each step instead."""

    def make(params: list[Tensor], *, weight_decay: float, **options: Any) -> torch.optim.Optimizer:
        def shrink(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            with torch.no_grad():
                for p in params:
                    p.mul_(1 - optimizer.param_groups[0]["lr"] * weight_decay)

        optimizer = kind(params, **options)
        optimizer.register_step_pre_hook(shrink)
        return optimizer

    return make


def signsgd(params: list[Tensor], **options: Any) -> torch.optim.Optimizer:
    return pytorch_optimizer.SignSGD(params, momentum=0.0, **options)


def signum_as_lion(
    params: list[Tensor], *, momentum: float, nesterov: bool, **options: Any
) -> torch.optim.Optimizer:
    assert nesterov
    return lion_pytorch.Lion(params, betas=(momentum**2, momentum), **options)


ORACLES = [
    Oracle(
        "sgd",
        "torch",
        decoupled(torch.optim.SGD),
        ANY,
        {"lr": 0.05, "momentum": 0.9},
        difference=COUPLED,
    ),
    Oracle(
        "sgd",
        "torch",
        decoupled(torch.optim.SGD),
        ANY,
        {"lr": 0.05, "momentum": 0.8, "nesterov": True},
        label="nesterov",
        difference=COUPLED,
    ),
    Oracle(
        "lars",
        "pytorch-optimizer",
        pytorch_optimizer.LARS,
        MATRICES,
        {"lr": 1.0, "momentum": 0.9, "trust_coefficient": 1e-2},
        schedule=False,
        difference="its learning rate is outside the buffer, so it was constant; matrices alone, "
        "as it steps vectors by plain SGD",
    ),
    Oracle(
        "signsgd",
        "pytorch-optimizer",
        signsgd,
        ANY,
        {"lr": 1e-3},
        difference="its momentum was 0",
    ),
    Oracle(
        "signum", "pytorch-optimizer", pytorch_optimizer.SignSGD, ANY, {"lr": 1e-3, "momentum": 0.9}
    ),
    Oracle(
        "signum",
        "lion-pytorch",
        signum_as_lion,
        ANY,
        {"lr": 1e-3, "momentum": 0.9, "nesterov": True},
        label="nesterov",
        difference="as Lion with betas (b^2, b)",
    ),
    Oracle("lion", "lion-pytorch", lion_pytorch.Lion, ANY, {"lr": 1e-3}),
]
