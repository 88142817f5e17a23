"""Stochastic gradient descent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from steepest.optim.hyperparameters import is_zero
from steepest.optim.live import Hyper
from steepest.optim.recipe import Recipe
from steepest.optim.rule import Rule, State


@dataclass(frozen=True)
class SGD(Rule):
    """SGD with heavy-ball momentum (Polyak, 1964; Sutskever et al., ICML 2013).

    m <- mu m + g;  u = m, or g + mu m with nesterov

    The learning rate stays outside the buffer, as in torch.optim.SGD. Weight decay is decoupled
    (SGDW: Loshchilov & Hutter, arXiv:1711.05101, Algorithm 1), unlike torch's, which adds it to g.
    """

    lr: float = 0.1
    weight_decay: float = 0.0
    momentum: float = 0.9
    nesterov: bool = False

    elementwise: ClassVar[bool] = True

    def init(self, param: Tensor) -> State:
        """Return the momentum buffer, or nothing when momentum is 0."""
        return {} if is_zero(self.momentum) else {"momentum": torch.zeros_like(param)}

    def update(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> tuple[Tensor, State]:
        """Return the momentum (or the gradient where there is none)."""
        if "momentum" not in state:
            return grad, {}
        m = h.momentum * state["momentum"] + grad
        return (grad + h.momentum * m if self.nesterov else m), {"momentum": m}


RECIPES = (
    Recipe(
        "sgd",
        SGD(),
        family="SGD and sign",
        year=1964,
        paper="Polyak, heavy-ball momentum; SGDW arXiv:1711.05101",
        state="4 * m * n if momentum else 0",
    ),
)
