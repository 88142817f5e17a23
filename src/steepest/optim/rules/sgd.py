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


@dataclass(frozen=True)
class LARS(Rule):
    """LARS, layer-wise adaptive rate scaling (You, Gitman & Ginsburg, 2017, arXiv:1708.03888).

    ratio = trust_coefficient ||w|| / (||g|| + wd ||w||), or 1 where ||w|| or ||g|| is 0
    m <- mu m + lr ratio (g + wd w);  w <- w - m

    Algorithm 1: the learning rate is inside the buffer, weight decay inside ratio and buffer. The
    polynomial decay of its learning rate is left to the schedule. Every tensor has its ratio, gains
    and biases too. A step moves a tensor by about lr * trust_coefficient of its own norm, so lr is
    about 1 or more.
    """

    lr: float = 1.0
    weight_decay: float = 5e-4
    momentum: float = 0.9
    trust_coefficient: float = 1e-3

    def init(self, param: Tensor) -> State:
        """Return the buffer of past steps, zero."""
        return {"momentum": torch.zeros_like(param)}

    def update(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> tuple[Tensor, State]:
        """Return the buffer, which has the learning rate in it."""
        w, g = torch.linalg.vector_norm(param), torch.linalg.vector_norm(grad)
        ratio = h.trust_coefficient * w / (g + h.weight_decay * w)
        ratio = torch.where((w == 0) | (g == 0), 1.0, ratio)
        m = h.momentum * state["momentum"] + h.lr * ratio * (grad + h.weight_decay * param)
        return m, {"momentum": m}

    def apply(self, param: Tensor, direction: Tensor, h: Hyper) -> Tensor:
        """Return the parameter after the step that the buffer is."""
        return param - direction


RECIPES = (
    Recipe(
        "sgd",
        SGD(),
        family="SGD and sign",
        year=1964,
        paper="Polyak, heavy-ball momentum; SGDW arXiv:1711.05101",
        state="4 * m * n if momentum else 0",
        differs=(
            "torch.optim.SGD adds weight decay to the gradient.",
            "SGDW's paper has the learning rate inside the momentum buffer.",
        ),
    ),
    Recipe(
        "lars",
        LARS(),
        family="SGD and sign",
        year=2017,
        paper="You, Gitman & Ginsburg, arXiv:1708.03888",
        state="4 * m * n",
        differs=(
            "timm, torch_optimizer and pytorch-optimizer have the learning rate outside the "
            "buffer, which is the same while it is constant.",
            "pytorch-optimizer steps vectors by plain SGD.",
            "timm and torch_optimizer have no ratio where weight decay is 0.",
            "optax divides by ||g + wd w||.",
        ),
    ),
)
