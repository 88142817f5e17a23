"""PSGD: factors of a preconditioner fitted so that its output is white."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from steepest.errors import UserError
from steepest.optim import random
from steepest.optim.live import Hyper
from steepest.optim.recipe import Recipe
from steepest.optim.rule import Rule, State, ema
from steepest.optim.rules.kronecker import SIDES

NOISE = 2.0**-11.5
"""Root of float32's precision: how much of the noise the fitted momentum gets."""

BALANCE = 100
"""Updates of the factors from one time that they are balanced to the next."""


@dataclass(frozen=True)
class Kron(Rule):
    """PSGD Kron (Li, 2015, arXiv:1512.04202; the authors of kron_torch).

    m <- b m + (1 - b) G;  M = m / (1 - b^t);  V ~ N(0, 1);  X = M + 2^-11.5 mean|M| V
    A = Q1 X Q2^T;  B = Q1^-T V Q2^-1
    Q1 <- Q1 - precond_lr triu(A A^T - B B^T) Q1 / |A A^T + B B^T|, Q2 with A^T A and B^T B
    P = Q1^T Q1 M Q2^T Q2;  u = P min(1, clip_threshold / rms(P))

    |.| is a lower bound of the spectral norm, b is `momentum`. Q1 and Q2, upper triangular, are
    updated whenever 1 / p(t) steps have passed since they were: p falls from the first to the
    second `probability` by a factor of exp(-probability_decay) a step, from `probability_start` on.
    Each 100th time they are first given equal largest entries. Qi is diagonal where the side is 1
    or longer than `max_size_triangular`, and with memory_save_mode "one_diag" for the longest side;
    vectors and scalars have one diagonal Q. Without `momentum_into_precond_update` X is made of G.
    A tensor of more dimensions is a matrix of its first against the rest.
    """

    lr: float = 3e-4
    weight_decay: float = 0.0
    momentum: float = 0.9
    precond_lr: float = 0.1
    precond_init_scale: float = 1.0
    probability: tuple[float, float] = (1.0, 0.03)
    probability_decay: float = 1e-3
    probability_start: int = 500
    clip_threshold: float = 1.1
    max_size_triangular: int = 8192
    memory_save_mode: str | None = field(default=None, metadata={"choices": ("one_diag",)})
    momentum_into_precond_update: bool = True

    reads_param: ClassVar[bool] = False
    draws: ClassVar[bool] = True
    fixed: ClassVar[frozenset[str]] = frozenset({"probability", "probability_decay"})

    def __post_init__(self) -> None:
        """Refuse updates at other steps for each run."""
        for name in self.fixed:
            value = getattr(self, name)
            if any(isinstance(v, Tensor) for v in (value if isinstance(value, tuple) else [value])):
                raise UserError(f"{name} of kron must be the same for all runs.")

    def init(self, param: Tensor) -> State:
        """Return the momentum, zero, and factors of one, without `precond_init_scale`."""
        state = {"momentum": torch.zeros_like(param)}
        if param.ndim < 2:
            return state | {"factor": torch.ones_like(param)}
        m, n = len(param), param[0].numel()
        longest = "left" if m > n else "right"
        for side, size in zip(SIDES, (m, n), strict=True):
            q = param.new_ones(size)
            one_diag = self.memory_save_mode == "one_diag" and side == longest
            diagonal = size == 1 or size > self.max_size_triangular or one_diag
            state[f"factor_{side}"] = q if diagonal else torch.diag_embed(q)
        return state

    def scalars(self, step: int, values: Mapping[str, Any]) -> dict[str, float]:
        """Return the momentum's bias correction, and whether (1 or 0) factors are balanced."""
        balances = self._updates(step) % BALANCE == 0
        return {"scale1": 1 / (1 - values["momentum"] ** step), "balances": float(balances)}

    def prepares(self, step: int) -> bool:
        """Whether the factors are updated before this step."""
        return self._updates(step) > self._updates(step - 1)

    def prepare(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> State:
        """Return the factors after a step towards a white momentum."""
        x = grad
        if self.momentum_into_precond_update:
            x = h.scale1 * ema(state["momentum"], grad, h.momentum)
        v = random.normal(random.fold(state["key"], h.step), grad.shape, grad.dtype)
        x = x + NOISE * x.abs().mean() * v
        if "factor" in state:
            q = h.precond_init_scale * state["factor"]
            q = _moved(q, ((q * x) ** 2, (v / q) ** 2), h.precond_lr)
            return {"factor": q / h.precond_init_scale}
        left, right = self._factors(state, h)
        sizes = left.abs().amax(), right.abs().amax()
        mean = (sizes[0] * sizes[1]).sqrt()
        left, right = (
            torch.where(h.balances > 0, q * (mean / size), q)
            for q, size in zip((left, right), sizes, strict=True)
        )
        a = _times(_times(x.flatten(1), left).mT, right).mT
        b = _over(_over(v.flatten(1), left).mT, right).mT
        left = _moved(left, _grams(a, b, left), h.precond_lr)
        right = _moved(right, _grams(a.mT, b.mT, right), h.precond_lr)
        unit = h.precond_init_scale.sqrt()
        return {"factor_left": left / unit, "factor_right": right / unit}

    def update(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> tuple[Tensor, State]:
        """Return the whitened momentum, its root mean square limited."""
        m = ema(state["momentum"], grad, h.momentum)
        p = h.scale1 * m
        if "factor" in state:
            p = (h.precond_init_scale * state["factor"]) ** 2 * p
        else:
            p = p.flatten(1)
            for q in self._factors(state, h):
                p = _times(p, q)
                p = (q.unsqueeze(-1) * p if q.ndim == 1 else q.mT @ p).mT
            p = p.reshape(grad.shape)
        rms = (p * p).mean().sqrt()
        return p * torch.clamp(h.clip_threshold / (rms + 1e-12), max=1), {"momentum": m}

    def _factors(self, state: State, h: Hyper) -> tuple[Tensor, Tensor]:
        unit = h.precond_init_scale.sqrt()
        return unit * state["factor_left"], unit * state["factor_right"]

    def _updates(self, step: int) -> int:
        """Return at how many of the first steps the factors are updated."""
        counts = _counts(*self.probability, self.probability_decay, self.probability_start)
        return counts.upto(step)


class Counts:
    """How many updates there are up to each step, of an update every 1 / p(t) steps."""

    def __init__(self, first: float, last: float, decay: float, start: int) -> None:
        self.first, self.last, self.decay, self.start = first, last, decay, start
        self.known = [0]
        self.waited = 0

    def upto(self, step: int) -> int:
        """Return the number of updates at steps 1 to `step`."""
        while len(self.known) <= step:
            past = max(len(self.known) - 1 - self.start, 0)
            p = max(self.first * math.exp(-self.decay * past), self.last)
            self.waited += 1
            due = p > 0 and self.waited >= 1 / p
            self.known.append(self.known[-1] + due)
            self.waited = 0 if due else self.waited
        return self.known[step]


_counts = functools.cache(Counts)


def _times(x: Tensor, q: Tensor) -> Tensor:
    """Return Q X of a triangular or a diagonal Q."""
    return q.unsqueeze(-1) * x if q.ndim == 1 else q @ x


def _over(x: Tensor, q: Tensor) -> Tensor:
    """Return Q^-T X of a triangular or a diagonal Q."""
    if q.ndim == 1:
        return x / q.unsqueeze(-1)
    solved: Tensor = torch.linalg.solve_triangular(q.mT, x, upper=False)
    return solved


def _grams(a: Tensor, b: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Return A A^T and B B^T, or their diagonals for a diagonal Q."""
    if q.ndim == 1:
        return (a * a).sum(1), (b * b).sum(1)
    return a @ a.mT, b @ b.mT


def _moved(q: Tensor, grams: tuple[Tensor, Tensor], lr: Tensor) -> Tensor:
    """Return a factor after a step that makes the grams more alike."""
    aa, bb = grams
    total = aa + bb
    largest = total.abs().amax().clamp(min=torch.finfo(q.dtype).tiny)
    step = (aa - bb) / largest
    relative = step * q if q.ndim < 2 else (step.triu() / _norm(total / largest)) @ q
    moved: Tensor = q - lr * relative
    return moved


def _norm(t: Tensor) -> Tensor:
    """Return a lower bound of the spectral norm, by two products with the largest column."""
    column = (t * t).sum(0).argmax().unsqueeze(0)
    y = t @ t.index_select(1, column)
    size = y.norm()
    tiny = torch.finfo(t.dtype).tiny
    bound: Tensor = ((t @ y).norm() / size.clamp(min=tiny)).clamp(min=tiny)
    return bound


RECIPES = (
    Recipe(
        "kron",
        Kron(),
        family="Kronecker",
        year=2015,
        paper="Li, arXiv:1512.04202; https://github.com/evanatyourservice/kron_torch",
        state="8 + 4 * m * n + 4 * sum(size if size == 1 or size > max_size_triangular or"
        " (memory_save_mode == 'one_diag' and longest) else size * size for size, longest in"
        " ((m, m > n), (n, n >= m)))",
        differs=(
            "kron_torch adds the noise to the momentum that it then preconditions, decays matrices "
            "alone, balances at random, about every 100th time, and fails on scalars.",
            "psgd_torch's newer versions have another step for Q, divided by a running maximum.",
        ),
    ),
)
