"""Adam and its family: gradients divided by a moving root mean square."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from steepest.optim.live import Hyper
from steepest.optim.recipe import Part, Recipe
from steepest.optim.roles import Role
from steepest.optim.rule import Rule, State, ema


@dataclass(frozen=True)
class AdamW(Rule):
    """AdamW (Loshchilov & Hutter, 2019, arXiv:1711.05101, Algorithm 2).

    m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2
    u = m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)
    """

    lr: float = 1e-3
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    elementwise: ClassVar[bool] = True

    def init(self, param: Tensor) -> State:
        """Return both moments, zero."""
        return {"exp_avg": torch.zeros_like(param), "exp_avg_sq": torch.zeros_like(param)}

    def scalars(self, step: int, values: Mapping[str, Any]) -> dict[str, float]:
        """Return the factors that undo the bias of both moments."""
        b1, b2 = values["betas"]
        return {"scale1": 1 / (1 - b1**step), "root_scale2": (1 - b2**step) ** -0.5}

    def update(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> tuple[Tensor, State]:
        """Return the corrected first moment over the root of the corrected second."""
        b1, b2 = h.betas
        m = ema(state["exp_avg"], grad, b1)
        v = ema(state["exp_avg_sq"], grad * grad, b2)
        direction = h.scale1 * m / (h.root_scale2 * v.sqrt() + h.eps)
        return direction, {"exp_avg": m, "exp_avg_sq": v}


def adam_for_the_rest(mine: frozenset[Role], rule: AdamW | None = None) -> Part:
    """Return the part that steps the roles beside `mine` by AdamW, as `adam_...`."""
    return Part("adam", frozenset(Role) - mine, rule or AdamW())


RECIPES = (
    Recipe(
        "adamw",
        AdamW(),
        family="Adam",
        year=2019,
        paper="Loshchilov & Hutter, arXiv:1711.05101",
        state="8 * m * n",
    ),
)
