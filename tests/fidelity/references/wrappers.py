"""What goes around any method, from the papers."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

import numpy as np

from references.base import Array, Reference


class Wrapper(Reference):
    """Base of wrappers: `Wrapper.around(AdamW)` is a class with AdamW inside, `inner`.

    Its `setup` takes the hyperparameters of both, flat. Where both have a name, it is the inner
    method's, and the wrapper's own is called <wrapper>_<name>: lookahead around SOAP takes
    update_interval and lookahead_update_interval. What the wrapper lacks (`adopt`, `observe`,
    `average`, ...) is the inner method's. Methods of several parameters can't be wrapped here.
    """

    name: ClassVar[str]
    kind: ClassVar[type[Reference]]
    inner: Reference

    @classmethod
    def around(cls, kind: type[Any]) -> type[Any]:
        """Return the class of this wrapper around a class."""
        if kind.group:
            raise TypeError(f"{cls.__name__} around {kind.__name__}, which moves a group")
        theirs = list(inspect.signature(kind.setup).parameters.values())
        names = {p.name for p in theirs}
        mine = {
            f"{cls.name}_{p.name}" if p.name in names else p.name: p
            for p in list(inspect.signature(cls.setup).parameters.values())[1:]
        }

        def setup(self: Wrapper, **hyper: Any) -> None:
            own = {p.name: hyper.pop(name) for name, p in mine.items() if name in hyper}
            self.inner = kind(self.x, weight_decay=self.weight_decay, draw=self.draw, **hyper)
            cls.setup(self, **own)

        merged = [*theirs[1:], *(p.replace(name=name) for name, p in mine.items())]
        named = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in merged]
        setup.__signature__ = inspect.Signature([theirs[0], *named])  # type: ignore[attr-defined]
        return type(f"{cls.__name__}{kind.__name__}", (cls,), {"setup": setup, "kind": kind})

    def __getattr__(self, name: str) -> Any:
        if name == "inner":
            raise AttributeError(name)
        return getattr(self.inner, name)

    def inner_step(self, grad: Array, lr: float) -> None:
        """Let the inner method step from our parameter; the result is `inner.x`."""
        self.t += 1
        self.inner.x = self.x
        self.inner.step(grad, lr)

    def accept(self, x: Array) -> None:
        """Make `x` the parameter of both."""
        self.x = self.inner.x = x


def has_direction(method: Reference) -> bool:
    """Return whether a method's step is x <- x - lr (u + wd x) of its `direction`."""
    if isinstance(method, DirectionWrapper):
        return has_direction(method.inner)
    return type(method).step is Reference.step


class DirectionWrapper(Wrapper):
    """Base of wrappers that change the gradient, or the direction before lr and decay.

    A method with a step of its own (coupled decay, trust ratios) has for direction its whole
    step over -lr, decay inside; lr must then be positive.
    """

    def gradient(self, g: Array) -> Array:
        """Return the gradient that the inner method gets."""
        return g

    def change(self, u: Array, g: Array) -> Array:
        """Return the direction in place of the inner method's `u`; `g` is the raw gradient."""
        return u

    def direction(self, g: Array) -> Array | None:
        self.inner.t += 1
        self.inner.x = self.x
        u = self.inner.direction(self.gradient(g))
        return None if u is None else self.change(u, g)

    def step(self, grad: Array, lr: float) -> None:
        if has_direction(self):
            super().step(grad, lr)
        else:
            g = np.asarray(grad, dtype=np.float64)
            self.inner_step(self.gradient(g), lr)
            self.x = self.x - lr * self.change((self.x - self.inner.x) / lr, g)
        self.inner.x = self.x


class Cautious(DirectionWrapper):
    """Liang et al. 2024 (arXiv:2411.16085), Algorithm 1 and equation (3), with xi = 1.

    mask = 1 where u g > 0, else 0, with the raw gradient of this step;
    u <- u mask size / (sum(mask) + 1), over the tensor. Decay isn't masked. State is the inner
    method's: what is masked isn't lost there. The factor exceeds 1 whenever anything is masked,
    and is below 1 (n / (n + 1)) where nothing is; a scalar's is 1/2 or its step 0.

    `margin`, per element, is the least |u| relative to the tensor's root mean square: a sign
    that a precision can't tell moves the element, and all the others by 1 / sum(mask).

    Different: timm and lion-pytorch divide by mean(mask), clamped to at least 1e-3; HeavyBall's
    mask compares sign bits (u g = 0 may pass) and its factor is size / max(sum(mask), 1).

    Defaults: none of its own
    """

    name = "cautious"

    def setup(self) -> None:
        self.least = np.full_like(self.x, np.inf)

    def change(self, u: Array, g: Array) -> Array:
        rms = np.sqrt(np.mean(u**2))
        undecided = (u != 0) & (g != 0)
        relative = np.where(undecided, np.abs(u) / (rms if rms > 0 else 1.0), np.inf)
        self.least = np.minimum(self.least, relative)
        mask = u * g > 0
        return u * mask * (mask.size / (mask.sum() + 1))

    @property
    def margin(self) -> Array:
        return np.minimum(self.least, getattr(self.inner, "margin", np.inf))


class Lookahead(Wrapper):
    """Zhang et al. 2019 (arXiv:1907.08610), Algorithm 1, k = `update_interval`.

    Slow weights start from the initial parameter. After steps k, 2k, ...: slow <- slow + alpha
    (x - slow), x <- slow. The inner method's state goes on (the paper's default for its
    experiments; resetting and interpolating it are left out). Decay is the inner method's, of
    the fast weights. `average()` are the slow weights, which the paper evaluates.

    Different: timm copies the slow weights from x only after the first k steps, so that the first
    average does nothing. 6 and 0.5 are timm's defaults; the authors' code has 5 and 0.8, and
    kozistr 5 and 0.5.

    Defaults: none of its own
    """

    name = "lookahead"

    def setup(self, update_interval: int = 6, alpha: float = 0.5) -> None:
        self.interval, self.alpha = update_interval, alpha
        self.slow = self.x.copy()

    def step(self, grad: Array, lr: float) -> None:
        self.inner_step(grad, lr)
        x = self.inner.x
        if self.t % self.interval == 0:
            x = self.slow = self.slow + self.alpha * (x - self.slow)
        self.accept(x)

    def average(self) -> Array:
        """Return the evaluation weights."""
        return self.slow


class GrowthLimiter(DirectionWrapper):
    """Chen et al. 2024 (Fira, arXiv:2410.01623): the norm-growth limiter.

    s = |u|, over the tensor; from the second direction on, with p the norm of the last one after
    limiting: f = max(s / (p + 1e-8), growth_limit) / growth_limit; u <- u / f, p <- s / f. The
    first direction passes. Neither lr nor decay counts. After a direction of zero the norm may
    grow from 1e-8 only, by growth_limit a step (authors' code).

    Fira limits the part of its update outside of the projection, APOLLO (arXiv:2412.05270) its
    whole update, with the same formula; here it is the whole direction of the inner method.

    Defaults: none of its own
    """

    name = "growth_limiter"

    def setup(self, growth_limit: float = 1.01) -> None:
        self.growth_limit = growth_limit
        self.previous: float | None = None

    def change(self, u: Array, g: Array) -> Array:
        size = float(np.linalg.norm(u))
        factor = 1.0
        if self.previous is not None:
            ratio = size / (self.previous + 1e-8)
            factor = max(ratio, self.growth_limit) / self.growth_limit
        self.previous = size / factor
        return u / factor


class AdaptiveClipping(DirectionWrapper):
    """Brock et al. 2021 (NFNets, arXiv:2102.06171), equation (3): adaptive gradient clipping.

    For each unit i (row of [out, in]; the first dimension against all others): where
    |g_i| > limit = clipping max(|x_i|, eps), g_i <- g_i limit / max(|g_i|, 1e-6). Of vectors,
    scalars and tensors with one side longer than 1 the unit is the whole tensor (the authors'
    unitwise_norm squeezes). The parameter is that before the step. The paper doesn't clip the
    last layer; that is the caller's choice of roles.

    Different: timm has units by row for [n, 1] too; kozistr tests the clamped norm; HeavyBall's
    unit is always the whole tensor.

    Defaults: none of its own
    """

    name = "adaptive_clipping"

    def setup(self, clipping: float = 0.01, eps: float = 1e-3) -> None:
        self.clipping, self.eps = clipping, eps

    def gradient(self, g: Array) -> Array:
        limit = self.clipping * np.maximum(unit_norms(self.x), self.eps)
        size = unit_norms(g)
        return np.where(size > limit, g * limit / np.maximum(size, 1e-6), g)


def unit_norms(values: Array) -> Array:
    """Return norms of rows, or of all where only one side is longer than 1."""
    whole = np.squeeze(values).ndim <= 1
    axes = tuple(range(values.ndim)) if whole else tuple(range(1, values.ndim))
    return np.sqrt(np.sum(values**2, axis=axes, keepdims=True))


def to_bfloat16(values: Array) -> Array:
    """Round to float32, then to bfloat16, both to nearest, ties to even; as float64."""
    bits = np.asarray(values, dtype=np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return from_bits(rounded, values)


def from_bits(bits: Array, values: Array) -> Array:
    """Return the float32 of each pattern of bits, as float64; of values not finite, themselves."""
    floats = bits.astype(np.uint32).view(np.float32).astype(np.float64)
    return np.where(np.isfinite(values), floats, values)


class StochasticRounding(Wrapper):
    """Unbiased rounding of a bfloat16 parameter (Gupta et al. 2015, arXiv:1502.02551; for bf16
    weights Zamirai et al. 2020, arXiv:2010.06192).

    The inner method steps, decay included, from the bfloat16 values in full precision; the new
    value is rounded to float32 (nearest), and of its 32 bits b: b <- b + r, then the low 16 bits
    are cleared. r = floor(65536 draw("uniform", t, x.shape)), an element's own, once a step. So
    |x| rounds up with probability (low 16 bits of b) / 65536, and exact values stay. Not of
    infinities and NaN. The initial parameter is rounded to nearest even. State isn't rounded.

    Another precision's float32 value may be another by a few units of the 24-bit significand,
    and round to the neighbour, 2^-8 away. `margin`, per element, is the least distance of
    (low bits + r) from 65535.5, the jump, as a fraction of |x|: 2^-24 is about one unit.

    Different: HeavyBall, torchao and kozistr add the same 16 random bits to the float32's; theirs
    come from torch's generator.

    Defaults: none of its own
    """

    name = "stochastic_rounding"

    def setup(self) -> None:
        self.accept(to_bfloat16(self.x))
        self.least = np.full_like(self.x, np.inf)

    def step(self, grad: Array, lr: float) -> None:
        self.inner_step(grad, lr)
        x = self.inner.x
        bits = np.asarray(x, dtype=np.float32).view(np.uint32).astype(np.uint64)
        drawn = np.floor(65536 * np.asarray(self.draw("uniform", self.t, x.shape)))
        low = (bits & 0xFFFF).astype(np.float64) + drawn
        self.least = np.minimum(self.least, np.abs(low - 65535.5) * 2.0**-24)
        self.accept(from_bits((bits + drawn.astype(np.uint64)) & 0xFFFF0000, x))

    @property
    def margin(self) -> Array:
        return np.minimum(self.least, getattr(self.inner, "margin", np.inf))


class Kahan(Wrapper):
    """Kahan summation of a bfloat16 parameter (Zamirai et al. 2020, arXiv:2010.06192), in the
    form of torch-optimi: what x lacks is `c`, where the paper's is minus that.

    c starts from 0, bfloat16. The inner method's change d, decay included, is computed from the
    bfloat16 x in full precision; then, [.] rounding to float32 and to bfloat16 (nearest, even):
      c <- [c + d];  y = [x + c];  c <- [c + [x - y]];  x <- y
    The initial parameter is rounded to nearest even, what is lost is not compensated. State isn't
    rounded. Gradient and decay see x, not x + c.

    A tie that another precision breaks otherwise moves x by 2^-8 and c back: compare `total()`,
    x + c, which loses only c's rounding, 2^-9 of d.

    Different: optimi's x is first decayed in bfloat16, uncompensated, where lr wd < 2^-9 is lost,
    and its moments are bfloat16 too (its SGD without momentum is equal to the bit).

    Defaults: none of its own
    """

    name = "kahan"

    def setup(self) -> None:
        self.accept(to_bfloat16(self.x))
        self.c = np.zeros_like(self.x)

    def step(self, grad: Array, lr: float) -> None:
        x = self.x
        self.inner_step(grad, lr)
        self.c = to_bfloat16(self.c + (self.inner.x - x))
        y = to_bfloat16(x + self.c)
        self.c = to_bfloat16(self.c + to_bfloat16(x - y))
        self.accept(y)

    def total(self) -> Array:
        """Return the parameter with what rounding has held back."""
        return self.x + self.c


REFERENCES: dict[str, type] = {
    wrapper.name: wrapper
    for wrapper in (
        Cautious,
        Lookahead,
        GrowthLimiter,
        AdaptiveClipping,
        StochasticRounding,
        Kahan,
    )
}
