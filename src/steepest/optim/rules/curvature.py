"""Steps limited by an estimate of the curvature."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from steepest.optim.live import Hyper
from steepest.optim.recipe import Recipe
from steepest.optim.rule import Extra, Rule, State, ema


@dataclass(frozen=True)
class SophiaG(Rule):
    """Sophia-G (Liu et al., 2023, arXiv:2305.14342, Algorithms 2 and 3).

    m <- b1 m + (1 - b1) g
    before steps 1, 1 + update_interval, ...: h <- b2 h + (1 - b2) tokens s^2
    u = clip(m / max(rho h, eps), -1, 1)

    s is the gradient of the batch's mean loss on labels drawn from the model's own predictions, a
    mean over so many tokens (Gauss-Newton-Bartlett): it costs a forward and a backward pass more
    every update_interval steps, and is not to be clipped. Where h is small u is a sign; rho sets
    how much of it is (the paper's gamma; some 10 to 50 percent should not be clipped).
    """

    lr: float = 1e-4
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.965, 0.99)
    rho: float = 0.04
    eps: float = 1e-12
    update_interval: int = 10

    elementwise: ClassVar[bool] = True

    def init(self, param: Tensor) -> State:
        """Return the moment and the curvature, zero."""
        return {"exp_avg": torch.zeros_like(param), "hessian": torch.zeros_like(param)}

    def extra(self) -> Extra | None:
        """Return the gradient on sampled labels."""
        return "sampled_labels"

    def wants(self, step: int) -> bool:
        """Say that it is wanted at the first of every so many steps."""
        return (step - 1) % self.update_interval == 0

    def observe(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> State:
        """Return the curvature after this estimate."""
        return {"hessian": ema(state["hessian"], h.batch_tokens * grad * grad, h.betas[1])}

    def update(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> tuple[Tensor, State]:
        """Return the moment over the curvature, each element clipped."""
        m = ema(state["exp_avg"], grad, h.betas[0])
        direction = m / torch.clamp(h.rho * state["hessian"], min=h.eps)
        return direction.clamp(-1.0, 1.0), {"exp_avg": m}


RECIPES = (
    Recipe(
        "sophia_g",
        SophiaG(),
        family="curvature",
        year=2023,
        paper="Liu et al., arXiv:2305.14342",
        state="8 * m * n",
        differs=(
            "The authors' loop estimates after steps 10, 20, ... on another batch, so its first 10 "
            "steps are signs, and clips s to norm 1.",
            "The authors' code takes the number of tokens (bs, by default 5120) at the step and "
            "has eps 1e-15 added to the denominator.",
            "optax before #979 and several ports square the training gradient in place of s; "
            "scaling-for-scaling's Sophia never estimates, which is Signum.",
            "pytorch-optimizer's SophiaH has Hutchinson's estimate.",
        ),
    ),
)
