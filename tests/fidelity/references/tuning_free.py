"""Methods that tune their own learning rate, or need no schedule of it, from their papers."""

from __future__ import annotations

import math

import numpy as np

from references.base import Array, GroupReference, Reference


class Prodigy(GroupReference):
    """Mishchenko & Defazio 2023 (arXiv 2306.06101), its Adam form, as their prodigyopt 1.1.2.

    One d for all parameters, an estimate of the distance |x0 - x*|; k counts from 1. With
    a = lr c_k, where c_k is 1, or sqrt(1 - b2^k) / (1 - b1^k) with `bias_correction`:

    r <- b3 r + d^2 a sum <g, x0 - x>             m <- b1 m + (1 - b1) d g
    s <- b3 s + d^2 (a, or 1 if safeguard) g      v <- b2 v + (1 - b2) d^2 g^2
    d_hat = d_coef r / |s|_1, the norm over all parameters
    x <- x - d a (m / (sqrt(v) + d_new eps) + wd x), where d is still the old one.

    b3 is sqrt(b2) unless given. d_new = min(d_max, d growth_rate), where d_max is the greatest
    d_hat so far (and d0); the growth limit does not hold back the leap out of d0: while d is d0,
    d is first replaced by max(d, d_hat). d0 scales r and s in the authors' code, and cancels.
    The learning rate is inside r and s, hence `safeguard_warmup`: no lr in s (nor c_k). It
    remains in r.

    The paper has factors 1 - b3 in r and s, that cancel, eps times the old d, and no growth limit
    or d_coef. At lr = 0 the authors' code returns before anything changes, k included, and so do
    we; and where s is zero everywhere, nothing moves and k stays.

    Different: optax.contrib.prodigy (1.2 / 0.25 off after 1 / 12 steps); prodigyopt's slice_p > 1
    takes r and s from every p-th element, not offered. Its groups may differ in lr only by 0.

    Defaults: lr 1.0, weight_decay 0
    """

    def setup(
        self,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        beta3: float | None = None,
        eps: float = 1e-8,
        d0: float = 1e-6,
        d_coef: float = 1.0,
        growth_rate: float = math.inf,
        bias_correction: bool = False,
        safeguard_warmup: bool = False,
    ) -> None:
        self.betas, self.eps = betas, eps
        self.beta3 = math.sqrt(betas[1]) if beta3 is None else beta3
        self.d0, self.d_coef, self.growth_rate = d0, d_coef, growth_rate
        self.bias_correction, self.safeguard = bias_correction, safeguard_warmup
        self.d = self.d_max = d0
        self.k = 0
        self.r = 0.0
        self.starts = [x.copy() for x in self.xs]
        self.ms, self.vs, self.ss = ([np.zeros_like(x) for x in self.xs] for _ in range(3))

    def step(self, grads: list[Array], lr: float) -> None:
        self.t += 1
        if lr == 0:
            return
        b1, b2 = self.betas
        gs = [np.asarray(g, dtype=np.float64) for g in grads]
        a, d = lr, self.d
        if self.bias_correction:
            a *= math.sqrt(1 - b2 ** (self.k + 1)) / (1 - b1 ** (self.k + 1))

        progress = sum(
            float(np.sum(g * (start - x)))
            for g, start, x in zip(gs, self.starts, self.xs, strict=True)
        )
        weight = d**2 * (1.0 if self.safeguard else a)
        self.ms = [b1 * m + (1 - b1) * d * g for m, g in zip(self.ms, gs, strict=True)]
        self.vs = [b2 * v + (1 - b2) * (d * g) ** 2 for v, g in zip(self.vs, gs, strict=True)]
        self.ss = [self.beta3 * s + weight * g for s, g in zip(self.ss, gs, strict=True)]
        norm = sum(float(np.sum(np.abs(s))) for s in self.ss)
        if norm == 0:
            return
        self.r = self.beta3 * self.r + d**2 * a * progress
        self.estimate(self.d_coef * self.r / norm)
        self.xs = [
            x - d * a * (m / (np.sqrt(v) + self.d * self.eps) + wd * x)
            for x, m, v, wd in zip(self.xs, self.ms, self.vs, self.weight_decays, strict=True)
        ]
        self.k += 1

    def estimate(self, d_hat: float) -> None:
        """Take the new estimate of the distance into d."""
        leap = max(self.d, d_hat) if self.d == self.d0 else self.d
        self.d_max = max(self.d_max, d_hat)
        self.d = min(self.d_max, leap * self.growth_rate)


class ScheduleFree(Reference):
    """Base: Defazio et al. 2024 (arXiv 2405.15682), as the authors' package schedulefree 1.4.1.

    From z = x = the initial weights, with the gradient taken at y = (1 - beta) z + beta x:

    z <- z - lr_t (u + wd y),   x <- (1 - c_t) x + c_t z,   c_t = w_t / (w_1 + ... + w_t),
    w_t = t^r max(lr_1, ..., lr_t)^weight_lr_power,   lr_t = lr min(1, t / warmup_steps).

    The attribute `x` is y, the training weights; `average()` is x, the ones to evaluate. The
    learning rate may still change: the average weighs by the greatest one so far. While all w
    are 0 (lr 0), c_t is 0. Decay is of y, in z; not the base class's. State: v for AdamW, and one
    of x and z, as y gives the other while 0 < beta < 1 (the authors keep y and z).
    """

    beta: float

    def begin(self, warmup_steps: int, r: float, weight_lr_power: float) -> None:
        self.warmup_steps, self.r, self.power = warmup_steps, r, weight_lr_power
        self.z, self.averaged = self.x.copy(), self.x.copy()
        self.greatest = self.total = 0.0

    def step(self, grad: Array, lr: float) -> None:
        self.t += 1
        if self.t < self.warmup_steps:
            lr = lr * self.t / self.warmup_steps
        self.greatest = max(self.greatest, lr)
        w = self.t**self.r * self.greatest**self.power
        self.total += w
        c = w / self.total if self.total > 0 else 0.0
        u = self.direction(np.asarray(grad, dtype=np.float64))
        self.z = self.z - lr * (u + self.weight_decay * self.x)
        self.averaged = (1 - c) * self.averaged + c * self.z
        self.x = (1 - self.beta) * self.z + self.beta * self.averaged

    def average(self) -> Array:
        """Return the weights to evaluate."""
        return self.averaged


class ScheduleFreeAdamW(ScheduleFree):
    """Schedule-free AdamW: u = g / (sqrt(v / (1 - b2^t)) + eps), beta = b1, no first moment.

    The paper's Algorithm 1 has no correction in v; lr_t is multiplied by sqrt(1 - b2^t) instead,
    and so the decay and the weights w too (the package's AdamWScheduleFreePaper). While b2^t is
    not small these are different methods; we follow AdamWScheduleFree, what everybody uses.

    Defaults: lr 2.5e-3, weight_decay 0
    """

    def setup(
        self,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        warmup_steps: int = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
    ) -> None:
        self.begin(warmup_steps, r, weight_lr_power)
        self.beta, self.b2 = betas
        self.eps = eps
        self.v = np.zeros_like(self.x)

    def direction(self, g: Array) -> Array:
        self.v = self.b2 * self.v + (1 - self.b2) * g**2
        return g / (np.sqrt(self.v / (1 - self.b2**self.t)) + self.eps)


class ScheduleFreeSGD(ScheduleFree):
    """Schedule-free SGD: u = g, and `momentum` is beta, the share of the average in y.

    Defaults: lr 1.0, weight_decay 0
    """

    def setup(
        self,
        momentum: float = 0.9,
        warmup_steps: int = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
    ) -> None:
        self.begin(warmup_steps, r, weight_lr_power)
        self.beta = momentum

    def direction(self, g: Array) -> Array:
        return g


REFERENCES: dict[str, type] = {
    "prodigy": Prodigy,
    "schedulefree_adamw": ScheduleFreeAdamW,
    "schedulefree_sgd": ScheduleFreeSGD,
}
