"""Second moments kept as a row and a column instead of a matrix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from steepest.optim.live import Hyper
from steepest.optim.recipe import Recipe
from steepest.optim.rule import Rule, State, ema


@dataclass(frozen=True)
class Adafactor(Rule):
    """Adafactor with an external learning rate (Shazeer & Stern, 2018, arXiv:1804.04235).

    b2 = 1 - t^-0.8;  q = g^2 + eps
    r <- b2 r + (1 - b2) mean_columns(q);  c <- b2 c + (1 - b2) mean_rows(q)
    u = g / sqrt(r c^T / mean(r));  u <- u / max(1, rms(u) / clip_threshold)
    with momentum: m <- b1 m + (1 - b1) u;  u = m

    Algorithms 4 and 5 of the paper without the relative step size and the parameter scale, so
    that the schedule is the benchmark's. Vectors keep the whole second moment. A tensor of more
    than two dimensions is factored over its last two.
    """

    lr: float = 1e-2
    weight_decay: float = 0.0
    beta1: float | None = None
    decay_rate: float = 0.8
    clip_threshold: float = 1.0
    eps: float = 1e-30

    reads_param: ClassVar[bool] = False

    def init(self, param: Tensor) -> State:
        """Return row and column means (or the full second moment), and a moment if beta1 is set."""
        if param.ndim < 2:
            state = {"exp_avg_sq": torch.zeros_like(param)}
        else:
            state = {
                "exp_avg_sq_row": torch.zeros_like(param[..., 0]),
                "exp_avg_sq_col": torch.zeros_like(param[..., 0, :]),
            }
        return state if self.beta1 is None else state | {"exp_avg": torch.zeros_like(param)}

    def scalars(self, step: int, values: Mapping[str, Any]) -> dict[str, float]:
        """Return the second moment's decay at this step."""
        return {"beta2": 1 - step ** -values["decay_rate"]}

    def update(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> tuple[Tensor, State]:
        """Return the gradient over the factored root mean square, its own RMS clipped."""
        q = grad * grad + h.eps
        if grad.ndim < 2:
            new = {"exp_avg_sq": ema(state["exp_avg_sq"], q, h.beta2)}
            direction = grad * new["exp_avg_sq"].rsqrt()
        else:
            row = ema(state["exp_avg_sq_row"], q.mean(-1), h.beta2)
            col = ema(state["exp_avg_sq_col"], q.mean(-2), h.beta2)
            new = {"exp_avg_sq_row": row, "exp_avg_sq_col": col}
            # Roots before products: the ratio of a dead row to the mean may underflow.
            relative = row.rsqrt() * row.mean(-1, keepdim=True).sqrt()
            direction = grad * relative.unsqueeze(-1) * col.rsqrt().unsqueeze(-2)
        rms = (direction * direction).mean().sqrt()
        direction = direction / torch.clamp(rms / h.clip_threshold, min=1.0)
        if self.beta1 is not None:
            direction = ema(state["exp_avg"], direction, h.beta1)
            new["exp_avg"] = direction
        return direction, new


RECIPES = (
    Recipe(
        "adafactor",
        Adafactor(),
        family="light state",
        year=2018,
        paper="Shazeer & Stern, arXiv:1804.04235",
        state="4 * (m + n) + (0 if beta1 is None else 4 * m * n)",
    ),
)
