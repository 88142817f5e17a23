"""Orthogonalised momentum: every singular value of the update is made about one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from steepest.optim.linalg import newton_schulz
from steepest.optim.live import Hyper
from steepest.optim.recipe import HIDDEN, Recipe
from steepest.optim.rule import Rule, State, ema
from steepest.optim.rules.adam import AdamW, adam_for_the_rest


@dataclass(frozen=True)
class Muon(Rule):
    """Muon (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon).

    m <- mu m + (1 - mu) g;  x = mu m + (1 - mu) g with nesterov, else m
    u = max(1, rows / columns)^(1/2) NewtonSchulz(x)

    For hidden matrices; a tensor of more dimensions is a matrix of its first against the rest.
    `ns_dtype` is the dtype of the Newton-Schulz products.
    """

    lr: float = 0.02
    weight_decay: float = 0.0
    momentum: float = 0.95
    nesterov: bool = True
    ns_steps: int = 5
    ns_dtype: str = "bfloat16"

    reads_param: ClassVar[bool] = False
    least_ndim: ClassVar[int] = 2
    splits: ClassVar[bool] = True

    def init(self, param: Tensor) -> State:
        """Return the gradient's moving average, zero."""
        return {"momentum": torch.zeros_like(param)}

    def update(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> tuple[Tensor, State]:
        """Return the orthogonalised momentum."""
        m = ema(state["momentum"], grad, h.momentum)
        x = (ema(grad, m, 1 - h.momentum) if self.nesterov else m).flatten(1)
        u = newton_schulz(x, self.ns_steps, dtype=getattr(torch, self.ns_dtype))
        scale = max(1.0, x.shape[0] / x.shape[1]) ** 0.5
        return (scale * u).view_as(grad), {"momentum": m}


RECIPES = (
    Recipe(
        "muon",
        Muon(),
        family="orthogonal",
        year=2024,
        paper="Jordan et al., https://kellerjordan.github.io/posts/muon",
        state="4 * m * n",
        parts=(
            adam_for_the_rest(
                HIDDEN, AdamW(lr=3e-4, weight_decay=0.0, betas=(0.9, 0.95), eps=1e-10)
            ),
        ),
    ),
)
