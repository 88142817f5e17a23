"""MARS: variance-reduced gradients for AdamW, Lion and Shampoo, from the paper."""

from __future__ import annotations

import math

import numpy as np

from references.base import Array, Reference, SignMethod
from references.hybrid import quintic


class MARS(Reference):
    """Yuan et al. 2024 (arXiv:2411.10438), Algorithm 1: the gradient that all three use.

    c = g + gamma b1 / (1 - b1) (g - previous), divided by its norm over the whole tensor if
    that is above 1. `exact`: `previous` is the gradient of this batch at the weights before the
    last step, given by `observe` before every step but the first, at which it is g (the paper's
    x_1 = x_0). Approximate (MARS-approx, the default): `previous` is the gradient that the last
    step was given, and zero at the first step, as in the authors' code (AGI-Arena/MARS; the paper
    is silent): there c_1 = (1 + gamma b1 / (1 - b1)) g. The code does so in its exact variant too.

    For matrices; the authors give gains and biases to AdamW (their code by dimension, so embeddings
    and heads get MARS). timm has c_1 = g; HeavyBall's `mars` doesn't clip.
    """

    def begin(self, b1: float, gamma: float, exact: bool) -> None:
        """Keep what the corrected gradient depends on, and start the moment."""
        self.b1, self.gamma, self.exact = b1, gamma, exact
        self.m = np.zeros_like(self.x)
        self.previous: Array | None = None if exact else np.zeros_like(self.x)

    def observe(self, previous_grad: Array) -> None:
        """Take the coming step's batch's gradient at the weights before the last step."""
        assert self.exact
        assert self.t >= 1, "there is no step before the first"
        self.previous = np.asarray(previous_grad, dtype=np.float64)

    def average(self, g: Array) -> Array:
        """Take the corrected gradient c into the moment, and return it."""
        previous = g if self.exact and self.t == 1 else self.previous
        assert previous is not None, "observe was not called"
        self.previous = None if self.exact else g
        strength = self.gamma * self.b1 / (1 - self.b1)
        c = g + strength * (g - previous)
        length = max(1.0, float(np.linalg.norm(c)))
        self.terms = (np.abs((1 + strength) * g) + np.abs(strength * previous)) / length
        self.m = self.b1 * self.m + (1 - self.b1) * c / length
        return c / length


class MARSAdamW(MARS):
    """MARS-AdamW, Algorithm 2: Adam's moments of c, both bias corrected.

    Defaults: lr 3e-3, weight_decay 0
    v <- b2 v + (1 - b2) c^2, of the clipped c: the README of the authors' code has the plain
    gradient there, paper and code have c. Decoupled decay, learning rate outside. The
    paper's GPT-2 runs have lr 6e-3 to 2e-3 and decay 0.01.
    """

    def setup(
        self,
        betas: tuple[float, float] = (0.95, 0.99),
        eps: float = 1e-8,
        gamma: float = 0.025,
        exact: bool = False,
    ) -> None:
        self.begin(betas[0], gamma, exact)
        self.b2, self.eps = betas[1], eps
        self.v = np.zeros_like(self.x)

    def direction(self, g: Array) -> Array:
        c = self.average(g)
        self.v = self.b2 * self.v + (1 - self.b2) * c**2
        root = np.sqrt(self.v / (1 - self.b2**self.t))
        return self.m / (1 - self.b1**self.t) / (root + self.eps)


class MARSLion(MARS, SignMethod):
    """MARS-Lion, Algorithm 3: u = sign(m), m the average of c with one beta, `momentum`.

    Defaults: lr 3e-3, weight_decay 0
    The default rate is the code's for all three and large for a sign method: the benchmark
    "Scaling for Scaling" has 2e-4. The second beta of the code's (0.95, 0.99) is unused here.
    """

    def setup(self, momentum: float = 0.95, gamma: float = 0.025, exact: bool = False) -> None:
        SignMethod.setup(self)
        self.begin(momentum, gamma, exact)

    def direction(self, g: Array) -> Array:
        self.average(g)
        self.size = self.b1 * self.size + (1 - self.b1) * self.terms
        return self.sign(self.m, self.size)


class MARSShampoo(MARS):
    """MARS-Shampoo, Algorithm 4, with Newton-Schulz as in the authors' code instead of the SVD.

    Defaults: lr 3e-3, weight_decay 0
    u = sqrt(max(1, rows / columns)) NS(m / (1 - b1)), b1 = `momentum`. Jordan's quintic, from
    X / (|X| + 1e-8): the code passes its eps of 1e-8 for the 1e-7 of Muon. From the code: the
    factor, the division by 1 - b1 (which only matters beside that 1e-8), and clipping of c;
    Algorithm 4 has none of them. The code runs NS in bfloat16. The EPFL benchmark's copy crashes.
    More than two dimensions are flattened to the first against the rest (the code: to AdamW).
    """

    def setup(
        self,
        momentum: float = 0.95,
        gamma: float = 0.025,
        ns_steps: int = 5,
        exact: bool = False,
    ) -> None:
        self.begin(momentum, gamma, exact)
        self.ns_steps = ns_steps

    def direction(self, g: Array) -> Array:
        self.average(g)
        matrix = (self.m / (1 - self.b1)).reshape(len(g), -1)
        rows, columns = matrix.shape
        u = quintic(matrix / (np.linalg.norm(matrix) + 1e-8), self.ns_steps)
        return (math.sqrt(max(1.0, rows / columns)) * u).reshape(g.shape)


REFERENCES: dict[str, type] = {
    "mars_adamw": MARSAdamW,
    "mars_lion": MARSLion,
    "mars_shampoo": MARSShampoo,
}
