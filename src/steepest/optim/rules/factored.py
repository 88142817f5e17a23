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
            direction = over_factored_root(grad, row, col)
        direction = clip_rms(direction, h.clip_threshold)
        if self.beta1 is not None:
            direction = ema(state["exp_avg"], direction, h.beta1)
            new["exp_avg"] = direction
        return direction, new


def over_factored_root(value: Tensor, row: Tensor, col: Tensor) -> Tensor:
    """Return value / sqrt(row col^T / mean(row)), the squares' row and column means given."""
    # Roots before products: the ratio of a dead row to the mean may underflow.
    relative = row.rsqrt() * row.mean(-1, keepdim=True).sqrt()
    divided: Tensor = value * relative.unsqueeze(-1) * col.rsqrt().unsqueeze(-2)
    return divided


def clip_rms(value: Tensor, most: Tensor) -> Tensor:
    """Return the value, scaled down where its root mean square is more than `most`."""
    rms = (value * value).mean().sqrt()
    clipped: Tensor = value / torch.clamp(rms / most, min=1.0)
    return clipped


@dataclass(frozen=True)
class CAME(Rule):
    """CAME, confidence-guided Adafactor (Luo et al., 2023, arXiv:2307.02047, Algorithm 2).

    r, c <- b2 r, c + (1 - b2) row and column means of g^2 + eps
    d = g / sqrt(r c^T / mean(r));  d <- d / max(1, rms(d) / clip_threshold)
    m <- b1 m + (1 - b1) d
    R, C <- b3 R, C + (1 - b3) row and column means of (d - m)^2 + eps2, with the new m
    u = m / sqrt(R C^T / mean(R))

    Nothing is corrected for its start from zero: with the default betas the first steps are some
    11 lr per element, so warm up. Vectors keep the whole second moment and take u = m. A tensor of
    more than two dimensions is factored over its last two.
    """

    lr: float = 2e-4
    weight_decay: float = 0.01
    betas: tuple[float, float, float] = (0.9, 0.999, 0.9999)
    eps: float = 1e-30
    eps2: float = 1e-16
    clip_threshold: float = 1.0

    reads_param: ClassVar[bool] = False

    def init(self, param: Tensor) -> State:
        """Return the moment, and the means of squares and of deviations, all zero."""
        if param.ndim < 2:
            return {"exp_avg": torch.zeros_like(param), "exp_avg_sq": torch.zeros_like(param)}
        row, col = param[..., 0], param[..., 0, :]
        return {
            "exp_avg": torch.zeros_like(param),
            "exp_avg_sq_row": torch.zeros_like(row),
            "exp_avg_sq_col": torch.zeros_like(col),
            "exp_avg_res_row": torch.zeros_like(row),
            "exp_avg_res_col": torch.zeros_like(col),
        }

    def update(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> tuple[Tensor, State]:
        """Return the moment of Adafactor's direction over the factored root of its deviations."""
        b1, b2, b3 = h.betas
        q = grad * grad + h.eps
        if grad.ndim < 2:
            v = ema(state["exp_avg_sq"], q, b2)
            m = ema(state["exp_avg"], clip_rms(grad * v.rsqrt(), h.clip_threshold), b1)
            return m, {"exp_avg": m, "exp_avg_sq": v}
        row = ema(state["exp_avg_sq_row"], q.mean(-1), b2)
        col = ema(state["exp_avg_sq_col"], q.mean(-2), b2)
        d = clip_rms(over_factored_root(grad, row, col), h.clip_threshold)
        m = ema(state["exp_avg"], d, b1)
        deviation = (d - m) ** 2 + h.eps2
        res_row = ema(state["exp_avg_res_row"], deviation.mean(-1), b3)
        res_col = ema(state["exp_avg_res_col"], deviation.mean(-2), b3)
        return over_factored_root(m, res_row, res_col), {
            "exp_avg": m,
            "exp_avg_sq_row": row,
            "exp_avg_sq_col": col,
            "exp_avg_res_row": res_row,
            "exp_avg_res_col": res_col,
        }


RECIPES = (
    Recipe(
        "adafactor",
        Adafactor(),
        family="light state",
        year=2018,
        paper="Shazeer & Stern, arXiv:1804.04235",
        state="4 * (m + n) + (0 if beta1 is None else 4 * m * n)",
    ),
    Recipe(
        "came",
        CAME(),
        family="light state",
        year=2023,
        paper="Luo et al., arXiv:2307.02047",
        state="4 * m * n + 8 * (m + n)",
        differs=("scaling-for-scaling's scripts run it with eps2 1e-6.",),
    ),
)
