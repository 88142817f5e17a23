"""What the float64 transcriptions of the papers share.

A reference takes an initial parameter and the hyperparameters of `steepest.describe`, and `step`
moves it. References are written from the papers in NumPy, apart from the rules they check, and
prefer the paper's own form (sums, inverses, singular values) to an implementation's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np

Array = np.ndarray
Draw = Callable[[str, int, tuple[int, ...]], Array]
"""Random numbers of a step: kind ("normal", "uniform", "sign"), step from 1, shape -> values."""


class Reference:
    """One parameter, `x`, and the method that moves it: x <- x - lr (u + weight_decay x)."""

    group: ClassVar[bool] = False

    def __init__(
        self, x: Array, *, weight_decay: float = 0.0, draw: Draw | None = None, **hyper: Any
    ) -> None:
        self.x = np.array(x, dtype=np.float64)
        self.weight_decay = weight_decay
        self.draw = draw
        self.t = 0
        self.setup(**hyper)

    def setup(self, **hyper: Any) -> None:
        """Keep hyperparameters and make the state."""
        raise NotImplementedError

    def direction(self, g: Array) -> Array | None:
        """Return the direction of descent at this step, or None where nothing moves."""
        raise NotImplementedError

    def step(self, grad: Array, lr: float) -> None:
        """Move the parameter along its gradient; decay is of the parameter before the step."""
        self.t += 1
        u = self.direction(np.asarray(grad, dtype=np.float64))
        if u is not None:
            self.x = self.x - lr * u - lr * self.weight_decay * self.x


class GroupReference:
    """Several parameters, `xs`, that one method moves together."""

    group: ClassVar[bool] = True

    def __init__(
        self,
        xs: list[Array],
        *,
        weight_decays: list[float] | None = None,
        draw: Draw | None = None,
        **hyper: Any,
    ) -> None:
        self.xs = [np.array(x, dtype=np.float64) for x in xs]
        self.weight_decays = weight_decays or [0.0] * len(xs)
        self.draw = draw
        self.t = 0
        self.setup(**hyper)

    def setup(self, **hyper: Any) -> None:
        """Keep hyperparameters and make the state."""
        raise NotImplementedError

    def step(self, grads: list[Array], lr: float) -> None:
        """Move every parameter."""
        raise NotImplementedError


class SignMethod(Reference):
    """Base of methods whose direction is a sign.

    `margin` is, per element, the smallest |value| whose sign was taken, relative to the sum of
    the absolute values it was added up from: where it is near the rounding error of a precision,
    that precision can't decide the sign. An exact zero stays zero in any precision.
    """

    def setup(self, **hyper: Any) -> None:
        """Start the average, and the average of sizes that `margin` is relative to."""
        self.m = np.zeros_like(self.x)
        self.size = np.zeros_like(self.x)
        self.margin = np.full_like(self.x, np.inf)

    def sign(self, value: Array, size: Array) -> Array:
        """Return the sign of `value`, which is a sum of terms whose sizes add up to `size`."""
        exact = size == 0
        relative = np.where(exact, np.inf, np.abs(value) / np.where(exact, 1.0, size))
        self.margin = np.minimum(self.margin, relative)
        return np.sign(value)
