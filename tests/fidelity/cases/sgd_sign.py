"""SGD and sign methods."""

from __future__ import annotations

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
    Case("signum", {"lr": 1e-3}),
    Case("signum", {"lr": 1e-3, "momentum": 0.5}, "0.5"),
    Case("lion", {"lr": 1e-3}),
    Case("lion", {"lr": 1e-3, "betas": (0.95, 0.98)}, "0.95 0.98"),
]


class DecoupledSGD(torch.optim.SGD):
    """torch's SGD, whose own decay joins the gradient, after SGDW's decay of the weights."""

    def __init__(self, params: list[Tensor], *, weight_decay: float, **options: Any) -> None:
        super().__init__(params, **options)
        self.shrink = weight_decay

    def step(self, closure: Any = None) -> None:
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                p.mul_(1 - self.param_groups[0]["lr"] * self.shrink)
        super().step(closure)


ORACLES = [
    Oracle(
        "sgd",
        "torch",
        DecoupledSGD,
        ANY,
        {"lr": 0.05, "momentum": 0.9},
        difference="torch adds decay to the gradient; decay was decoupled around it",
    ),
    Oracle(
        "sgd",
        "torch",
        DecoupledSGD,
        ANY,
        {"lr": 0.05, "momentum": 0.8, "nesterov": True},
        label="nesterov",
        difference="torch adds decay to the gradient; decay was decoupled around it",
    ),
    Oracle("lion", "lion-pytorch", lion_pytorch.Lion, ANY, {"lr": 1e-3}),
    Oracle(
        "signum", "pytorch-optimizer", pytorch_optimizer.SignSGD, ANY, {"lr": 1e-3, "momentum": 0.9}
    ),
]
