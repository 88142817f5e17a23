"""Wrappers around any rule: other directions, other gradients, other ways to store a parameter."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from steepest.optim import random
from steepest.optim.live import Hyper
from steepest.optim.rule import Rule, State, compute_dtype
from steepest.optim.rules.adam import DecayInside
from steepest.optim.rules.lowrank import limited
from steepest.optim.wrapper import Wrapper, overrides


@dataclass(frozen=True)
class Redirecting(Wrapper):
    """Base of wrappers that change the inner rule's direction.

    Of a rule whose step is not lr times a direction and decay (Adan, schedule-free) the direction
    is the whole step over -lr, decay inside.
    """

    def __post_init__(self) -> None:
        """Take over what the inner rule is, and read the parameter for a step of its own."""
        super().__post_init__()
        object.__setattr__(self, "reads_param", self.reads_param or self.own_step)

    @property
    def own_step(self) -> bool:
        """Whether the inner rule's step is its own, not lr times direction and decay."""
        rule = self.inner
        while isinstance(rule, Wrapper) and not isinstance(rule, (Redirecting, Lookahead)):
            rule = rule.inner
        if isinstance(rule, Wrapper):
            return isinstance(rule, Lookahead)
        ordinary = type(rule).apply in (Rule.apply, DecayInside.apply)
        return not ordinary or overrides(rule, "move")

    def directed(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> tuple[Tensor, State]:
        """Return the inner rule's direction and the state entries that changed."""
        direction, new = self.inner.update(grad, param, state, h)
        if self.own_step:
            moved, changed = self.inner.move(param, direction, {**state, **new}, h)
            direction = (param - moved) / torch.where(h.lr == 0, 1.0, h.lr)
            new = {**new, **changed}
        return direction, new

    def move(
        self, param: Tensor, direction: Tensor, state: State, h: Hyper
    ) -> tuple[Tensor, State]:
        """Do as the inner rule, but where the direction is the whole step."""
        if self.own_step:
            return param.to(compute_dtype(param.dtype)) - h.lr * direction, {}
        return self.inner.move(param, direction, state, h)


@dataclass(frozen=True)
class Cautious(Redirecting):
    """Cautious updates (Liang et al., 2024, arXiv:2411.16085, Algorithm 1).

    mask = 1 where u g > 0, else 0;  u <- u mask / (mean(mask) + 1 / size)

    The gradient is the raw one; decay is outside the mask. `1 / size` is the paper's +1 in
    size / (sum(mask) + 1), which keeps the scale finite where no sign agrees.
    """

    prefix: ClassVar[str] = "cautious"
    sees_gradient: ClassVar[bool] = True

    def update(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> tuple[Tensor, State]:
        """Return the inner direction without the elements that oppose the gradient."""
        direction, new = self.directed(grad, param, state, h)
        mask = (direction * grad > 0).to(direction.dtype)
        return direction * mask * (mask.numel() / (mask.sum() + 1)), new


@dataclass(frozen=True)
class GrowthLimiter(Redirecting):
    """Norm-growth limiter (Chen et al., 2024, Fira, arXiv:2410.01623), of the whole direction.

    u <- u / max(1, |u| / |u of the last step| / growth_limit)

    The first direction passes. Neither lr nor decay counts. After a direction of zero the norm
    grows again from 1e-8.
    """

    growth_limit: float = 1.01

    prefix: ClassVar[str] = "growth_limiter"

    def init(self, param: Tensor) -> State:
        """Return the inner state, and a last norm that limits nothing."""
        return {**self.inner.init(param), "direction_norm": param.new_full((), math.inf)}

    def update(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> tuple[Tensor, State]:
        """Return the inner direction, no longer than its last norm allows."""
        direction, new = self.directed(grad, param, state, h)
        limit = self.own(h, "growth_limit")
        direction, norm = limited(direction, state["direction_norm"], limit)
        return direction, {**new, "direction_norm": norm}


@dataclass(frozen=True)
class AdaptiveClipping(Wrapper):
    """Adaptive gradient clipping (Brock et al., 2021, arXiv:2102.06171, equation 3).

    g_i <- g_i min(1, clipping max(|w_i|, eps) / |g_i|) in every row i of a weight [out, in]

    Vectors, scalars and matrices of a single row or column are clipped as a whole, tensors of more
    dimensions by their first. The authors leave the last layer alone.
    """

    clipping: float = 0.01
    eps: float = 1e-3

    prefix: ClassVar[str] = "adaptive_clipping"
    sees_gradient: ClassVar[bool] = True
    reads_param: ClassVar[bool] = True

    def clipped(self, grad: Tensor, param: Tensor, h: Hyper) -> Tensor:
        """Return the gradient, short beside the weight."""
        clipping, eps = self.own(h, "clipping"), self.own(h, "eps")
        limit = clipping * torch.clamp(_units(param), min=eps)
        size = _units(grad)
        clipped = grad * (limit / size.clamp(min=1e-6))
        return torch.where(size > limit, clipped, grad).to(grad.dtype)

    def update(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> tuple[Tensor, State]:
        """Return the inner direction for the clipped gradient."""
        return self.inner.update(self.clipped(grad, param, h), param, state, h)

    def start(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> State:
        """Do as the inner rule with the clipped gradient."""
        return self.inner.start(self.clipped(grad, param, h), param, state, h)

    def prepare(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> State:
        """Do as the inner rule with the clipped gradient."""
        return self.inner.prepare(self.clipped(grad, param, h), param, state, h)

    def refresh(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> State:
        """Do as the inner rule with the clipped gradient."""
        return self.inner.refresh(self.clipped(grad, param, h), param, state, h)

    def measure(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> dict[str, Tensor]:
        """Do as the inner rule with the clipped gradient."""
        return self.inner.measure(self.clipped(grad, param, h), param, state, h)


def _units(tensor: Tensor) -> Tensor:
    """Return the norms of rows, or of all where one side alone is longer than 1."""
    whole = sum(size > 1 for size in tensor.shape) < 2
    dims = tuple(range(0 if whole else 1, tensor.ndim))
    norms: Tensor = torch.linalg.vector_norm(tensor, dim=dims, keepdim=True)
    return norms


@dataclass(frozen=True)
class Lookahead(Wrapper):
    """Lookahead (Zhang et al., 2019, arXiv:1907.08610, Algorithm 1).

    every `update_interval` steps  slow <- slow + alpha (w - slow);  w <- slow

    Slow weights start from the initial ones and are those to evaluate with. The inner rule's state
    goes on.
    """

    update_interval: int = 6
    alpha: float = 0.5

    prefix: ClassVar[str] = "lookahead"
    everywhere: ClassVar[bool] = True
    elementwise: ClassVar[bool] = True
    averages: ClassVar[bool] = True

    def init(self, param: Tensor) -> State:
        """Return the inner state, and the slow weights."""
        return {**self.inner.init(param), "slow_param": param.clone()}

    def scalars(self, step: int, values: Mapping[str, Any]) -> dict[str, float]:
        """Return those of the inner rule, and whether (1 or 0) the slow weights move."""
        syncs = float(step % self.update_interval == 0)
        return {**self.inner.scalars(step, values), "syncs": syncs}

    def move(
        self, param: Tensor, direction: Tensor, state: State, h: Hyper
    ) -> tuple[Tensor, State]:
        """Return the fast weights, or the slow ones when those have moved."""
        fast, changed = self.inner.move(param, direction, state, h)
        slow = state["slow_param"]
        moved = slow + self.own(h, "alpha") * (fast - slow)
        slow = torch.where(h.syncs > 0, moved, slow)
        return torch.where(h.syncs > 0, moved, fast), {**changed, "slow_param": slow}

    def average(self, param: Tensor, state: State, h: Hyper) -> Tensor:
        """Return the slow weights."""
        return state["slow_param"]


@dataclass(frozen=True)
class Rounding(Wrapper):
    """Base of wrappers that round bfloat16 parameters their own way; others they leave alone."""

    elementwise: ClassVar[bool] = True
    stores: ClassVar[bool] = True
    everywhere: ClassVar[bool] = True

    def move(
        self, param: Tensor, direction: Tensor, state: State, h: Hyper
    ) -> tuple[Tensor, State]:
        """Return the new parameter, rounded if it is bfloat16."""
        new, changed = self.inner.move(param, direction, state, h)
        if param.dtype is not torch.bfloat16:
            return new, changed
        rounded, own = self.rounded(new.float(), param, state, h)
        return rounded, {**changed, **own}

    def rounded(self, new: Tensor, param: Tensor, state: State, h: Hyper) -> tuple[Tensor, State]:
        """Return the new value, one of bfloat16's, and the state entries that changed."""
        raise NotImplementedError


@dataclass(frozen=True)
class StochasticRounding(Rounding):
    """Stochastic rounding of bfloat16 parameters (Zamirai et al., 2020, arXiv:2010.06192).

    w <- the low 16 bits of float32(w) + r cleared, r uniform among 16-bit numbers

    So that a step smaller than half of bfloat16's last place is made with its own probability,
    and right on average. The rule steps in float32 from the rounded weights, with its state in
    float32. Parameters of other dtypes are left alone.
    """

    prefix: ClassVar[str] = "stochastic_rounding"
    draws: ClassVar[bool] = True

    def rounded(self, new: Tensor, param: Tensor, state: State, h: Hyper) -> tuple[Tensor, State]:
        """Return the value rounded up or down at random."""
        drawn = random.uniform(random.fold(state["key"], h.step), new.shape)
        return _cut(new, (drawn * 65536).to(torch.int32)), {}


@dataclass(frozen=True)
class Kahan(Rounding):
    """Kahan summation of bfloat16 parameters (Zamirai et al., 2020, arXiv:2010.06192).

    c <- [c + step];  y = [w + c];  c <- [c + [w - y]];  w <- y, with [] rounding to bfloat16

    c, 2 bytes per parameter, holds what rounding kept from w, so that small steps add up. Gradient
    and decay see w. Parameters of other dtypes are left alone, though they too get a c.
    """

    prefix: ClassVar[str] = "kahan"

    def init(self, param: Tensor) -> State:
        """Return the inner state, and what is held back, nothing."""
        held = torch.zeros_like(param, dtype=torch.bfloat16)
        return {**self.inner.init(param), "held_back": held}

    def rounded(self, new: Tensor, param: Tensor, state: State, h: Hyper) -> tuple[Tensor, State]:
        """Return what is stored of parameter and held back, and hold back the rest."""
        wide = param.float()
        held = _nearest(state["held_back"].float() + (new - wide))
        y = _nearest(wide + held)
        return y, {"held_back": _nearest(held + _nearest(wide - y))}


def _nearest(value: Tensor) -> Tensor:
    """Return a float32 value rounded to bfloat16, as float32.

    By its bits, because a compiler leaves out a cast to bfloat16 and back.
    """
    last = (value.view(torch.int32) >> 16) & 1
    return _cut(value, last + 0x7FFF)


def _cut(value: Tensor, added: Tensor) -> Tensor:
    """Return a float32 value without its low 16 bits, after adding to them."""
    cut = ((value.view(torch.int32) + added) & -65536).view(torch.float32)
    return torch.where(value.isfinite(), cut, value)
