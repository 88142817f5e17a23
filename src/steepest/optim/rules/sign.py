"""Sign methods: every element moves by the same amount."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from steepest.optim.live import Hyper
from steepest.optim.recipe import Recipe
from steepest.optim.rule import Rule, State, ema, sign


@dataclass(frozen=True)
class SignSGD(Rule):
    """signSGD, the sign of the gradient (Bernstein et al., 2018, arXiv:1802.04434, Algorithm 1).

    u = sign(g), and 0 where g is 0
    """

    lr: float = 1e-4
    weight_decay: float = 0.0

    elementwise: ClassVar[bool] = True

    def init(self, param: Tensor) -> State:
        """Return nothing: there is no state."""
        return {}

    def update(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> tuple[Tensor, State]:
        """Return the sign of the gradient."""
        return sign(grad), {}


@dataclass(frozen=True)
class Signum(Rule):
    """Signum, the sign of momentum (Bernstein et al., 2018, arXiv:1802.04434, Algorithm 2).

    m <- b m + (1 - b) g;  u = sign(m), or sign(b m + (1 - b) g) with nesterov

    With nesterov it is Lion with betas (b^2, b) (Semenov et al., 2025, arXiv:2509.01440,
    Algorithm 6, whose buffer m / (1 - b) has the same sign).
    """

    lr: float = 1e-4
    weight_decay: float = 0.0
    momentum: float = 0.9
    nesterov: bool = False

    elementwise: ClassVar[bool] = True

    def init(self, param: Tensor) -> State:
        """Return the gradient's moving average, zero."""
        return {"momentum": torch.zeros_like(param)}

    def update(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> tuple[Tensor, State]:
        """Return the sign of the new moving average, or of what it would be one step ahead."""
        m = ema(state["momentum"], grad, h.momentum)
        return sign(ema(m, grad, h.momentum) if self.nesterov else m), {"momentum": m}


@dataclass(frozen=True)
class Lion(Rule):
    """Lion, evolved sign momentum (Chen et al., 2023, arXiv:2302.06675, Algorithm 2).

    u = sign(b1 m + (1 - b1) g);  m <- b2 m + (1 - b2) g
    """

    lr: float = 1e-4
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.99)

    elementwise: ClassVar[bool] = True

    def init(self, param: Tensor) -> State:
        """Return the gradient's moving average, zero."""
        return {"momentum": torch.zeros_like(param)}

    def update(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> tuple[Tensor, State]:
        """Return the sign of the interpolation between the average and the gradient."""
        b1, b2 = h.betas
        m = state["momentum"]
        return sign(ema(m, grad, b1)), {"momentum": ema(m, grad, b2)}


RECIPES = (
    Recipe(
        "signsgd",
        SignSGD(),
        family="SGD and sign",
        year=2018,
        paper="Bernstein et al., arXiv:1802.04434",
        state="0",
    ),
    Recipe(
        "signum",
        Signum(),
        family="SGD and sign",
        year=2018,
        paper="Bernstein et al., arXiv:1802.04434",
        state="4 * m * n",
        differs=(
            "The EPFL benchmark's sign.py starts the buffer from a copy of the weights, not zero.",
        ),
    ),
    Recipe(
        "lion",
        Lion(),
        family="SGD and sign",
        year=2023,
        paper="Chen et al., arXiv:2302.06675",
        state="4 * m * n",
    ),
)
