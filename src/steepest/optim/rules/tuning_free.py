"""Methods that find their learning rate, or need no schedule of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from steepest.errors import UserError
from steepest.optim.live import Hyper
from steepest.optim.recipe import Recipe
from steepest.optim.rule import Rule, State, compute_dtype, ema


@dataclass(frozen=True)
class Prodigy(Rule):
    """Prodigy, Adam that estimates its step size (Mishchenko & Defazio, 2023, arXiv:2306.06101).

    a = lr, or lr sqrt(1 - b2^t) / (1 - b1^t) with bias_correction
    r <- b3 r + d^2 a <g, x0 - x>, and s <- b3 s + d^2 a g;  b3 = sqrt(b2) unless given
    m <- b1 m + (1 - b1) d g;  v <- b2 v + (1 - b2) d^2 g^2
    d' = d_coef r / |s|_1, over all parameters;  d_max <- max(d_max, d')
    x <- x - d a (m / (sqrt(v) + d_new eps) + wd x)

    d starts at d0 and grows to d_new = min(d_max, growth_rate d), or to max(d, d') at once from d0.
    Leave lr at 1 and give it a schedule; with safeguard_warmup s has d^2 g in place of d^2 a g, for
    long warm-ups. At lr 0 nothing changes. Where parameter groups have several lrs, each has its
    own in the sums. In float32 d0 = 1e-6 moves weights by less than their rounding at first.
    """

    lr: float = 1.0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    beta3: float | None = None
    eps: float = 1e-8
    d0: float = 1e-6
    d_coef: float = 1.0
    growth_rate: float = math.inf
    bias_correction: bool = False
    safeguard_warmup: bool = False

    elementwise: ClassVar[bool] = True

    def init(self, param: Tensor) -> State:
        """Return where the parameter starts, both moments and the weighted sum of gradients."""
        return {"x0": param.clone()} | {
            name: torch.zeros_like(param) for name in ("exp_avg", "exp_avg_sq", "s")
        }

    def shared(self) -> dict[str, float]:
        """Return this step's d and the next one's (0: d0), the largest d', r / d0, and t."""
        return {"d": 0.0, "d_next": 0.0, "d_max": 0.0, "r": 0.0, "moves": 0.0, "count": 0.0}

    def _beta3(self, h: Hyper) -> Tensor:
        b3: Tensor = h.betas[1].sqrt() if self.beta3 is None else h.beta3
        return b3

    def _rate(self, h: Hyper, count: Tensor) -> Tensor:
        """Return a, the learning rate before d."""
        b1, b2 = h.betas
        correction = (1 - b2**count).sqrt() / (1 - b1**count) if self.bias_correction else 1.0
        rate: Tensor = h.lr * correction
        return rate

    def _s(self, grad: Tensor, state: State, h: Hyper, d: Tensor, rate: Tensor) -> Tensor:
        """Return s / d0 after this gradient: d0 keeps it from underflow and cancels in r / |s|."""
        own = torch.ones_like(rate) if self.safeguard_warmup else rate
        s: Tensor = self._beta3(h) * state["s"] + d / h.d0 * d * own * grad
        return torch.where(h.lr > 0, s, state["s"])

    def measure(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> dict[str, Tensor]:
        """Return what this parameter adds to r and |s|_1, and whether it is stepped at all."""
        d = torch.where(h.d_next > 0, h.d_next, h.d0)
        rate = self._rate(h, h.count + 1)
        gain = (grad * (state["x0"] - param)).sum()
        return {
            "r": d / h.d0 * d * rate * gain,
            "s": self._s(grad, state, h, d, rate).abs().sum(),
            "stepped": (h.lr > 0).to(h.lr.dtype),
        }

    def combine(self, sums: Mapping[str, Tensor], h: Hyper) -> dict[str, Tensor]:
        """Return d of this step and of the next one."""
        d = torch.where(h.d_next > 0, h.d_next, h.d0)
        moves = (sums["stepped"] > 0) & (sums["s"] != 0)
        r = torch.where(moves, self._beta3(h) * h.r + sums["r"], h.r)
        found = torch.where(moves, h.d_coef * r / torch.where(moves, sums["s"], 1.0), d)
        largest = torch.maximum(torch.maximum(h.d_max, h.d0), found)
        grown = torch.where(d == h.d0, torch.maximum(d, found), d)
        return {
            "d": d,
            "d_next": torch.where(moves, torch.minimum(largest, grown * h.growth_rate), d),
            "d_max": torch.where(moves, largest, h.d_max),
            "r": r,
            "moves": moves.to(r.dtype),
            "count": h.count + moves,
        }

    def update(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> tuple[Tensor, State]:
        """Return Adam's direction for the gradient times d, without bias corrections."""
        b1, b2 = h.betas
        scaled = h.d * grad
        m, v = ema(state["exp_avg"], scaled, b1), ema(state["exp_avg_sq"], scaled * scaled, b2)
        s = self._s(grad, state, h, h.d, self._rate(h, h.count.clamp(min=1)))
        new = {"exp_avg": m, "exp_avg_sq": v, "s": s}
        new = {name: torch.where(h.lr > 0, value, state[name]) for name, value in new.items()}
        return m / (v.sqrt() + h.d_next * h.eps), new

    def apply(self, param: Tensor, direction: Tensor, h: Hyper) -> Tensor:
        """Return the parameter after a step of d a."""
        step = h.d * self._rate(h, h.count.clamp(min=1)) * h.moves
        moved: Tensor = param - step * (direction + h.weight_decay * param)
        return moved


@dataclass(frozen=True)
class ScheduleFree(Rule):
    """Base of schedule-free rules: gradients are taken at y, between the steps z and their mean x.

    The parameter holds y; the state has z.
    """

    warmup_steps: int = 0
    r: float = 0.0
    weight_lr_power: float = 2.0

    elementwise: ClassVar[bool] = True
    averages: ClassVar[bool] = True

    def beta(self, of: Any) -> Any:
        """Return the share of x in y, of live values or of the rule."""
        raise NotImplementedError

    def init(self, param: Tensor) -> State:
        """Return z, the parameter itself."""
        if bool((torch.as_tensor(self.beta(self)) <= 0).any()):
            raise UserError(
                "Schedule-free methods keep the average in the gap between two sequences, so their "
                "momentum (the first of betas) must be more than 0."
            )
        return {"z": param.clone()}

    def memory(self) -> dict[str, float]:
        """Return the sum of the weights of the average, and the largest lr, before any step."""
        return {"weight_sum": 0.0, "lr_max": 0.0}

    def remember(self, step: int, values: Mapping[str, Any]) -> dict[str, float]:
        """Return them with this step's."""
        lr_max = max(values["lr_max"], values["lr"] * self._warmup(step))
        weight = _weight(step, {**values, "lr_max": lr_max})
        return {"weight_sum": values["weight_sum"] + weight, "lr_max": lr_max}

    def scalars(self, step: int, values: Mapping[str, Any]) -> dict[str, float]:
        """Return the factor of warm-up, and c, the share of this step's z in the average."""
        total = values["weight_sum"]
        share = _weight(step, values) / total if total else 0.0
        return {"warmup": self._warmup(step), "share": share}

    def _warmup(self, step: int) -> float:
        return min(1.0, step / self.warmup_steps) if self.warmup_steps else 1.0

    def move(
        self, param: Tensor, direction: Tensor, state: State, h: Hyper
    ) -> tuple[Tensor, State]:
        """Return y after x and z have moved, and z."""
        y, z, beta = param.to(compute_dtype(param.dtype)), state["z"], self.beta(h)
        step = h.lr * h.warmup * (direction + h.weight_decay * y)
        # (1 - b) z + b x of the new z and x, in terms of the old y and z.
        return ema(y, z, 1 - h.share) + (beta * (1 - h.share) - 1) * step, {"z": z - step}

    def average(self, param: Tensor, state: State, h: Hyper) -> Tensor:
        """Return x = (y - (1 - b) z) / b."""
        beta = self.beta(h)
        x: Tensor = param + (1 - 1 / beta) * (state["z"] - param)
        return x


def _weight(step: int, values: Mapping[str, Any]) -> float:
    """Return the weight of a step in the average."""
    weight: float = step ** values["r"] * values["lr_max"] ** values["weight_lr_power"]
    return weight


@dataclass(frozen=True)
class ScheduleFreeAdamW(ScheduleFree):
    """Schedule-free AdamW (Defazio et al., 2024, arXiv:2405.15682).

    lr_t = lr min(1, t / warmup_steps);  c = w_t / (w_1 + ... + w_t)
    w_t = t^r (largest lr_t so far)^weight_lr_power
    v <- b2 v + (1 - b2) g^2;  u = g / (sqrt(v / (1 - b2^t)) + eps)
    z <- z - lr_t (u + wd y);  x <- (1 - c) x + c z;  y = (1 - b1) z + b1 x

    Gradients are of y, which the parameters hold; evaluate x: optimizer.eval(), and train() to go
    on. Use a constant lr, and warmup_steps in place of a schedule. Bias correction is as in the
    authors' package.
    """

    lr: float = 2.5e-3
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def beta(self, of: Any) -> Any:
        """Return b1."""
        return of.betas[0]

    def init(self, param: Tensor) -> State:
        """Return z and the second moment."""
        return super().init(param) | {"exp_avg_sq": torch.zeros_like(param)}

    def scalars(self, step: int, values: Mapping[str, Any]) -> dict[str, float]:
        """Return what the average needs, and what corrects the second moment's root."""
        correction = (1 - values["betas"][1] ** step) ** -0.5
        return super().scalars(step, values) | {"root_scale2": correction}

    def update(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> tuple[Tensor, State]:
        """Return the gradient over the corrected second moment's root."""
        v = ema(state["exp_avg_sq"], grad * grad, h.betas[1])
        return grad / (h.root_scale2 * v.sqrt() + h.eps), {"exp_avg_sq": v}


@dataclass(frozen=True)
class ScheduleFreeSGD(ScheduleFree):
    """Schedule-free SGD (Defazio et al., 2024, arXiv:2405.15682).

    lr_t = lr min(1, t / warmup_steps);  c = w_t / (w_1 + ... + w_t)
    w_t = t^r (largest lr_t so far)^weight_lr_power
    z <- z - lr_t (g + wd y);  x <- (1 - c) x + c z;  y = (1 - b) z + b x, where b is momentum

    Gradients are of y, which the parameters hold; evaluate x: optimizer.eval(), and train() to go
    on. Use a constant lr, and warmup_steps in place of a schedule.
    """

    lr: float = 1.0
    weight_decay: float = 0.0
    momentum: float = 0.9

    def beta(self, of: Any) -> Any:
        """Return the momentum."""
        return of.momentum

    def update(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> tuple[Tensor, State]:
        """Return the gradient."""
        return grad, {}


RECIPES = (
    Recipe(
        "prodigy",
        Prodigy(),
        family="tuning-free",
        year=2023,
        paper="Mishchenko & Defazio, arXiv:2306.06101",
        state="16 * m * n",
        differs=(
            "The paper has factors 1 - b3 in r and s, which cancel, the d before this step times "
            "eps, and neither growth_rate nor d_coef; optax follows it.",
            "prodigyopt calls bias_correction use_bias_correction, and refuses several lrs.",
        ),
    ),
    Recipe(
        "schedulefree_adamw",
        ScheduleFreeAdamW(),
        family="tuning-free",
        year=2024,
        paper="Defazio et al., arXiv:2405.15682",
        state="8 * m * n",
        differs=(
            "The paper's Algorithm 1 (AdamWScheduleFreePaper) leaves v as it is and multiplies "
            "lr_t by sqrt(1 - b2^t) instead, in decay and weights, too.",
        ),
    ),
    Recipe(
        "schedulefree_sgd",
        ScheduleFreeSGD(),
        family="tuning-free",
        year=2024,
        paper="Defazio et al., arXiv:2405.15682",
        state="4 * m * n",
    ),
)
