"""APOLLO, whose steps take their size from a random projection, and methods on int8 weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from steepest.errors import UserError
from steepest.optim import random
from steepest.optim.grid import Grid, from_grid, pack, to_grid, unpack
from steepest.optim.int8 import Int8Weight
from steepest.optim.live import Hyper
from steepest.optim.roles import NamedRole
from steepest.optim.rule import State, compute_dtype, one_of
from steepest.optim.rules.adam import TwoMoments
from steepest.optim.rules.eight_bit import Quantised
from steepest.optim.rules.lowrank import (
    EarlyAdamW,
    GaLore,
    channels,
    down,
    is_tall,
    limited,
    low_rank,
    moments_8bit,
    shapes,
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


def rounded(moved: Tensor, param: Tensor, group_size: int, key: Tensor, h: Hyper) -> Tensor:
    """Return new values of a parameter rounded at random to 8 bits, as it stores them.

    Raises UserError if it stores them in groups of another size.
    """
    uniform = random.uniform(random.fold(key, h.step), moved.shape, moved.dtype)
    grid = to_grid(moved, 8, group_size, uniform)
    if not isinstance(param, Int8Weight):
        return from_grid(grid, group_size)
    if param.transposed or param.group_size != group_size:
        raise UserError(
            f"A parameter of shape {tuple(param.shape)} is stored in groups of {param.group_size}, "
            f"{'columns' if param.transposed else 'rows'} first, and can't be rounded in groups of "
            f"{group_size} rows first; make a new optimizer with that group_size."
        )
    return Int8Weight(grid, group_size, param.dtype)


def plain(param: Tensor) -> Tensor:
    """Return a parameter's values in the dtype that rules compute in, where int8 stores them."""
    if not isinstance(param, Int8Weight):
        return param
    return param.dequantize(compute_dtype(param.dtype))


def group_size_of(named: NamedRole, param: Tensor) -> Mapping[str, Any]:
    """Return the group size of a parameter that is stored in int8."""
    return {"group_size": param.group_size} if isinstance(param, Int8Weight) else {}


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
    range from zero. `steepest.int8_weights` stores a model's hidden matrices so, in 1 byte and
    5 / group_size per weight. Float parameters take the same values, in their own dtype (float32
    exactly), without saving memory; given ones are not rounded before the first step. Q-APOLLO-Mini
    is rank 1, scale sqrt(128), scale_type "tensor".
    """

    eps: float = 1e-8
    group_size: int = 128

    rounds_to_int8: ClassVar[bool] = True

    def scalars(self, step: int, values: Mapping[str, Any]) -> dict[str, float]:
        """Return the bias corrections, all before the limiter, and the step when P was drawn."""
        late = super().scalars(step, values)
        return {**late, **TwoMoments.scalars(self, step, values), "correction": 1.0}

    def move(
        self, param: Tensor, direction: Tensor, state: State, h: Hyper
    ) -> tuple[Tensor, State]:
        """Return the parameter after the step, rounded to int8 at random."""
        moved, new = super().move(plain(param), direction, state, h)
        return rounded(moved, param, self.group_size, state["key"], h), new


@dataclass(frozen=True)
class QGaLore(GaLore):
    """Q-GaLore, GaLore in few bits (Zhang et al., 2024, arXiv:2407.08296, section 3.5).

    every T steps P <- Q(the `rank` leading singular vectors of G), to nearest
    R = G P^T (P^T G if G has more columns than rows);  u = scale back(method's direction for R)
    w <- Q(w - lr (u + wd w)), up or down at random

    T starts as `update_interval`, and is doubled at a refresh where the leading singular vector and
    that of the refresh before have had a cosine (without its sign) of at least `cos_threshold` in
    the mean of the last `queue_size` refreshes; above 1 it never is. Whether a refresh is due is
    read by the host every `update_interval` steps.

    Q rounds to equidistant values per group of `group_size`, row by row: 256 for weights, at random
    so that the mean is kept, and 2^`projection_bits` for P; zero is among them, and a group of one
    sign is clipped to its range from zero. P is stored in its codes, two to a byte up to 4 bits.
    `steepest.int8_weights` stores a model's hidden matrices so, in 1 byte and 5 / group_size per
    weight. Float parameters take the same values, in their own dtype (float32 exactly), without
    saving memory; given ones are not rounded before the first step.
    """

    projection_bits: int = 4
    group_size: int = 256
    cos_threshold: float = 0.4
    queue_size: int = 5

    draws: ClassVar[bool] = True
    rounds_to_int8: ClassVar[bool] = True

    def init(self, param: Tensor) -> State:
        """Return the method's state, codes of a projection, zero, and nothing of its history."""
        state = super().init(param)
        projection = state.pop("projection")
        return {
            **state,
            **self._stored(projection),
            "leading": projection.new_zeros(min(param.shape[0], param[0].numel())),
            "cosines": projection.new_full((self.queue_size,), -math.inf),
            "intervals": projection.new_zeros(()),
        }

    def due(self, state: State, h: Hyper) -> Tensor:
        """Say whether the refresh is due: T is so many update intervals, 0 before the first."""
        interval = state["intervals"] * self.update_interval
        due: Tensor = (interval == 0) | ((h.step - 1).remainder(interval) == 0)
        return due

    def prepare(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> State:
        """Return the projection on the leading singular vectors, rounded, and how it has turned."""
        projection = super().prepare(grad, param, state, h)["projection"]
        leading = projection[0] if is_tall(grad) else projection[:, 0]
        first = state["intervals"] == 0
        cosine = (leading * state["leading"]).sum(0, keepdim=True).abs()
        cosines = torch.cat([state["cosines"][1:], cosine])
        cosines = torch.where(first, state["cosines"], cosines)
        intervals = torch.where(first, 1.0, state["intervals"])
        new = {
            **self._stored(projection),
            "leading": leading,
            "cosines": cosines,
            "intervals": torch.where(cosines.mean() >= h.cos_threshold, 2.0, 1.0) * intervals,
        }
        due = self.due(state, h)
        return {name: torch.where(due, value, state[name]) for name, value in new.items()}

    def update(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> tuple[Tensor, State]:
        """Return the method's direction for the projected gradient, projected back."""
        projection = self._read(state, shapes(grad, self._rank(grad))[0])
        return super().update(grad, param, {**state, "projection": projection}, h)

    def move(
        self, param: Tensor, direction: Tensor, state: State, h: Hyper
    ) -> tuple[Tensor, State]:
        """Return the parameter after the step, rounded to int8 at random."""
        moved, new = super().move(plain(param), direction, state, h)
        return rounded(moved, param, self.group_size, state["key"], h), new

    def _stored(self, projection: Tensor) -> State:
        """Return a projection rounded to nearest, as it is kept."""
        codes, scale, zero = to_grid(projection, self.projection_bits, self.group_size)
        packed = pack(codes) if self.projection_bits <= 4 else codes
        return {"projection": packed, "projection_scale": scale, "projection_zero": zero}

    def _read(self, state: State, shape: tuple[int, int]) -> Tensor:
        """Return the projection from what is kept of it."""
        codes = state["projection"]
        if self.projection_bits <= 4:
            codes = unpack(codes, shape)
        grid = Grid(codes, state["projection_scale"], state["projection_zero"])
        return from_grid(grid, self.group_size)


def few_bits() -> str:
    """Return the bytes of a projection in codes, with scales and zeros."""
    size = "min(rank, m, n) * min(m, n)"
    codes = f"(-(-{size} // 2) if projection_bits <= 4 else {size})"
    return f"{codes} + 5 * -(-{size} // group_size)"


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
        adapt=group_size_of,
    ),
    low_rank(
        "q_galore",
        QGaLore(inner=Quantised(inner=EarlyAdamW(lr=1e-2, weight_decay=0.0))),
        2024,
        "Zhang et al., arXiv:2407.08296",
        f"{moments_8bit()} + {few_bits()} + 4 * (min(m, n) + queue_size + 1) + 8",
        "The authors' cosines have the sign that a singular value decomposition happens to give; "
        "scaling-for-scaling's threshold is 1, so that no interval is doubled.",
        "The authors' code keeps the 4-bit codes of projections as floats, and steps weights in "
        "the dtype of the gradient, where here it is float32.",
        adapt=group_size_of,
    ),
)
