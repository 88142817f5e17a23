"""APOLLO, whose steps take their size from a random projection, and methods on int8 weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from steepest.optim import random
from steepest.optim.live import Hyper
from steepest.optim.quantisation import spread
from steepest.optim.rule import State, one_of
from steepest.optim.rules.adam import TwoMoments
from steepest.optim.rules.eight_bit import Quantised
from steepest.optim.rules.lowrank import (
    EarlyAdamW,
    GaLore,
    channels,
    down,
    limited,
    low_rank,
    shapes,
    state_8bit,
)


@dataclass(frozen=True)
class Apollo(TwoMoments):
    """APOLLO (Zhu et al., 2024, arXiv:2412.05270, Algorithm 1 and equation 4).

    P ~ N(0, 1 / rank), new every `update_interval` steps;  R = G P^T (P^T G if G is wide)
    m <- b1 m + (1 - b1) R;  v <- b2 v + (1 - b2) R^2;  A = m / (sqrt(v) + eps)
    S = G |A_j| / |R_j| in row j (column j if G is wide), or G |A| / |R| with scale_type "tensor"
    S <- S / max(1, |S| / |S of the last step| / growth_limit)
    u = scale sqrt(1 - b2^t) / (1 - b1^t) S

    The bias correction is the authors' code's. Their package multiplies by the root of its `scale`:
    its 128 is sqrt(128) here. P is drawn anew at every step from the parameter's key, so that it
    takes no memory; a `rank` above the shorter side is taken literally. The first step is not
    limited. After a step without gradient the limiter starts again from a norm of 1e-8, which all
    but stops the matrix. For hidden matrices; a tensor of more dimensions is a matrix of its first
    against the rest.
    """

    lr: float = 1e-2
    weight_decay: float = 0.0
    eps: float = 1e-6
    rank: int = 256
    update_interval: int = 200
    scale: float = 1.0
    scale_type: str = one_of("channel", "tensor")
    growth_limit: float = 1.01

    elementwise: ClassVar[bool] = False
    reads_param: ClassVar[bool] = False
    draws: ClassVar[bool] = True
    least_ndim: ClassVar[int] = 2

    def init(self, param: Tensor) -> State:
        """Return both moments of the projected matrix, and a last norm that limits nothing."""
        _, low = shapes(param, self.rank)
        return super().init(param.new_zeros(low)) | {"norm": param.new_full((), math.inf)}

    def scalars(self, step: int, values: Mapping[str, Any]) -> dict[str, float]:
        """Return the bias corrections, all after the limiter, and the step when P was drawn."""
        found = super().scalars(step, values)
        return {
            "scale1": 1.0,
            "root_scale2": 1.0,
            "correction": found["scale1"] / found["root_scale2"],
            "drawn": float(step - (step - 1) % self.update_interval),
        }

    def update(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> tuple[Tensor, State]:
        """Return the gradient with each channel as much longer as Adam makes it in projection."""
        shape, _ = shapes(grad, self.rank)
        key = random.fold(state["key"], h.drawn)
        low = down(grad, random.normal(key, shape, grad.dtype) / math.sqrt(self.rank))
        m, v = self.moments(low, state, h)
        adapted = h.scale1 * m / (h.root_scale2 * v.sqrt() + h.eps)
        if self.scale_type == "tensor":
            scaled = grad * (adapted.norm() / (low.norm() + 1e-8))
        else:
            scaled = grad * channels(adapted, low, grad)
        scaled, norm = limited(scaled, state["norm"], h.growth_limit)
        new = {"exp_avg": m, "exp_avg_sq": v, "norm": norm}
        return h.scale * h.correction * scaled, new


def on_grid(values: Tensor, bits: int, group_size: int, uniform: Tensor | None = None) -> Tensor:
    """Return values rounded to 2^bits equidistant ones per group, row by row, zero among them.

    The grid of a group is as long as its values' range. It has to hold zero, so that of values of
    one sign those beyond its end are clipped (the authors' quantiser). Rounds to nearest, or with
    `uniform` numbers up with the probability of the distance from the lower one.
    """
    flat = values.flatten()
    ends = flat[-1:].expand(-len(flat) % group_size)
    groups = torch.cat([flat, ends]).view(-1, group_size)
    top = 2.0**bits - 1
    low, high = groups.aminmax(dim=1)
    step = (high - low).clamp(min=1e-5) / top
    zero = (-(low / step).round()).clamp(0, top)
    zero, step = (spread(t, flat, group_size) for t in (zero, step))
    scaled = flat / step
    if uniform is None:
        codes = scaled.round()
    else:
        codes = scaled.floor() + (uniform.flatten() < scaled - scaled.floor())
    return (((codes + zero).clamp(min=0, max=top) - zero) * step).view_as(values)


@dataclass(frozen=True)
class QApollo(Apollo):
    """Q-APOLLO, APOLLO on int8 weights (Zhu et al., 2024, arXiv:2412.05270, section 5.3).

    P ~ N(0, 1 / rank), new every `update_interval` steps;  R = G P^T (P^T G if G is wide)
    m <- b1 m + (1 - b1) R;  v <- b2 v + (1 - b2) R^2
    A = m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)
    S = G |A_j| / |R_j| in row j (column j if G is wide), or G |A| / |R| with scale_type "tensor"
    u = scale S / max(1, |S| / |S of the last step| / growth_limit)
    w <- Q(w - lr (u + wd w))

    Q rounds up or down at random, so that the mean is kept, to 256 equidistant values per group of
    `group_size` weights, row by row; zero is among them, and a group of one sign is clipped to its
    range from zero. The parameter holds such values in its own dtype (float32 exactly): what
    training in int8 does to the loss is seen, but no memory is saved. Given weights are not rounded
    before the first step. Q-APOLLO-Mini is rank 1, scale sqrt(128), scale_type "tensor".
    """

    eps: float = 1e-8
    group_size: int = 128

    def scalars(self, step: int, values: Mapping[str, Any]) -> dict[str, float]:
        """Return the bias corrections, all before the limiter, and the step when P was drawn."""
        late = super().scalars(step, values)
        return {**late, **TwoMoments.scalars(self, step, values), "correction": 1.0}

    def move(
        self, param: Tensor, direction: Tensor, state: State, h: Hyper
    ) -> tuple[Tensor, State]:
        """Return the parameter after the step, rounded to int8 at random."""
        moved, new = super().move(param, direction, state, h)
        uniform = random.uniform(random.fold(state["key"], h.step), moved.shape, moved.dtype)
        return on_grid(moved, 8, self.group_size, uniform), new


@dataclass(frozen=True)
class QGaLore(GaLore):
    """Q-GaLore, GaLore in few bits (Zhang et al., 2024, arXiv:2407.08296, section 3.5).

    every `update_interval` steps P <- Q(the `rank` leading singular vectors of G), to nearest
    R = G P^T (P^T G if G has more columns than rows);  u = scale back(method's direction for R)
    w <- Q(w - lr (u + wd w)), up or down at random

    Q rounds to equidistant values per group of `group_size`, row by row: 256 for weights, at random
    so that the mean is kept, and 2^`projection_bits` for P; zero is among them, and a group of one
    sign is clipped to its range from zero. The parameter holds such values in its own dtype
    (float32 exactly), P in float32: what few bits do to the loss is seen, but of their memory only
    that of the moments is saved. Given weights are not rounded before the first step.
    """

    projection_bits: int = 4
    group_size: int = 256

    draws: ClassVar[bool] = True

    def prepare(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> State:
        """Return the projection on the leading singular vectors, rounded."""
        exact = super().prepare(grad, param, state, h)["projection"]
        return {"projection": on_grid(exact, self.projection_bits, self.group_size)}

    def move(
        self, param: Tensor, direction: Tensor, state: State, h: Hyper
    ) -> tuple[Tensor, State]:
        """Return the parameter after the step, rounded to int8 at random."""
        moved, new = super().move(param, direction, state, h)
        uniform = random.uniform(random.fold(state["key"], h.step), moved.shape, moved.dtype)
        return on_grid(moved, 8, self.group_size, uniform), new


APOLLO = "Zhu et al., arXiv:2412.05270"
STATE = "8 * rank * max(m, n) + 12"
ROOT = (
    "apollo_torch's scale is squared: it multiplies by the root, so that its 128 is sqrt(128) here."
)
DECAY = "The authors' package decays the weight after the step, here it is the weight before it."
KOZISTR = (
    "pytorch_optimizer scales the projected gradient and projects it back, so that nothing of the "
    "gradient outside the projection moves the weights."
)
RECIPES = (
    low_rank("apollo", Apollo(), 2024, APOLLO, STATE, ROOT, DECAY, KOZISTR),
    low_rank(
        "apollo_mini",
        Apollo(rank=1, scale=math.sqrt(128), scale_type="tensor"),
        2024,
        APOLLO,
        STATE,
        ROOT,
        DECAY,
        KOZISTR,
    ),
    low_rank(
        "q_apollo",
        QApollo(),
        2024,
        APOLLO,
        STATE,
        ROOT,
        DECAY,
        "The authors' scripts have groups of 256, and their groups must divide the weights.",
        "scaling-for-scaling's rounds to nearest unless told otherwise.",
    ),
    low_rank(
        "q_galore",
        QGaLore(inner=Quantised(inner=EarlyAdamW(lr=1e-2, weight_decay=0.0))),
        2024,
        "Zhang et al., arXiv:2407.08296",
        f"{state_8bit()} + 8",
        "The authors' lazy refresh, which skips singular value decompositions of matrices whose "
        "first singular vector has settled, is left out.",
    ),
)
