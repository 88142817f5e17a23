"""Steepest descent under operator norms: Dion's low-rank updates and Scion's norm balls."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from steepest.optim import random
from steepest.optim.linalg import newton_schulz
from steepest.optim.live import Hyper
from steepest.optim.recipe import HIDDEN, Part, Recipe
from steepest.optim.roles import Role
from steepest.optim.rule import Rule, State, ema, one_of, sign
from steepest.optim.rules.adam import AdamW, adam_for_the_rest

BALL_EPS = 1e-8
"""Added to the root mean squares that Scion divides by."""


@dataclass(frozen=True)
class Dion(Rule):
    """Dion, orthonormal updates of low rank (Ahn et al., 2025, arXiv:2504.05295).

    B = m + g;  P = the Q factor of QR(B Q);  R = B^T P;  m <- B - (1 - mu) P R^T
    Q <- columns of R / (their norms + eps);  u = (rows / columns)^(1/2) P Q^T

    One step of power iteration from the last Q, which starts as random numbers. What `rank` columns
    do not catch stays in m. `rank` is capped by both sides of the matrix. For hidden matrices; a
    tensor of more dimensions is a matrix of its first against the rest.
    """

    lr: float = 0.01
    weight_decay: float = 0.01
    momentum: float = 0.95
    rank: int = 768
    eps: float = 1e-8

    reads_param: ClassVar[bool] = False
    least_ndim: ClassVar[int] = 2
    splits: ClassVar[bool] = True
    draws: ClassVar[bool] = True

    def init(self, param: Tensor) -> State:
        """Return the momentum and the right basis, zero until the first step draws it."""
        rows, columns = param.flatten(1).shape
        basis = param.new_zeros(columns, min(self.rank, rows, columns))
        return {"momentum": torch.zeros_like(param), "basis": basis}

    def prepares(self, step: int) -> bool:
        """The first step needs a basis to start from."""
        return step == 1

    def prepare(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> State:
        """Return a random basis."""
        key = random.fold(state["key"], h.step)
        return {"basis": random.normal(key, state["basis"].shape, grad.dtype)}

    def update(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> tuple[Tensor, State]:
        """Return the orthonormal matrix of low rank nearest to the momentum, about."""
        b = (state["momentum"] + grad).flatten(1)
        p = torch.linalg.qr(b @ state["basis"]).Q
        r = b.mT @ p
        m = (b - (1 - h.momentum) * (p @ r.mT)).view_as(grad)
        q = r / (r.norm(dim=0) + h.eps)
        u = (b.shape[0] / b.shape[1]) ** 0.5 * (p @ q.mT)
        kept = torch.where((b == 0).all(), state["basis"], q)  # A zero basis would never turn.
        return u.view_as(grad), {"momentum": m, "basis": kept}


@dataclass(frozen=True)
class Scion(Rule):
    """Scion, steps to the edge of a norm ball (Pethick et al., 2025, arXiv:2502.07529, Alg. 3).

    m <- (1 - a) m + a g;  u = scale edge(m);  x <- (1 - lr) x - lr u if constrained, else x - lr u
    edge(m), by `norm`:
      spectral: (rows / columns)^(1/2) NewtonSchulz(m)
      sign: sign(m) / columns;  rms: m / its root mean square
      row: rows of m / (columns * their root mean square)
      column: rows of m / their root mean square (columns of the paper's [hidden, vocab])

    `momentum`, a, is the weight of the NEW gradient: one minus everybody else's. Being constrained
    is a weight decay of 1, of every role; `weight_decay` adds to it. For hidden matrices, with
    `head_`, `embedding_` and `vector_` norms and scales for the rest. For an embedding tied to the
    head the authors use the head's: embedding_norm="sign", embedding_scale=3000.
    """

    lr: float = 3.6e-4
    weight_decay: float = 0.0
    momentum: float = 0.1
    norm: str = one_of("spectral", "sign", "column", "row", "rms")
    scale: float = 50.0
    constrained: bool = True
    ns_steps: int = 5
    ns_dtype: str = "bfloat16"

    reads_param: ClassVar[bool] = False
    splits: ClassVar[bool] = True

    def init(self, param: Tensor) -> State:
        """Return the gradient's moving average, zero."""
        return {"momentum": torch.zeros_like(param)}

    def update(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> tuple[Tensor, State]:
        """Return the point of the ball that is farthest along the momentum."""
        m = ema(state["momentum"], grad, 1 - h.momentum)
        return h.scale * self._edge(m), {"momentum": m}

    def apply(self, param: Tensor, direction: Tensor, h: Hyper) -> Tensor:
        """Return the parameter after a step, if constrained between it and the ball's edge."""
        pull = h.weight_decay + 1 if self.constrained else h.weight_decay
        moved: Tensor = param - h.lr * (direction + pull * param)
        return moved

    def _edge(self, m: Tensor) -> Tensor:
        """Return the point of the unit ball that is farthest along m."""
        matrix = m.flatten(1) if m.ndim > 1 else m.reshape(1, -1)
        columns = matrix.shape[1]
        if self.norm == "spectral":
            u = newton_schulz(matrix, self.ns_steps, dtype=getattr(torch, self.ns_dtype))
            kernel = math.prod(m.shape[2:])
            edge = (len(matrix) * kernel / columns) ** 0.5 / kernel * u
        elif self.norm == "sign":
            edge = sign(matrix) / columns
        elif self.norm == "rms":
            edge = matrix / (m.norm() / m.numel() ** 0.5 + BALL_EPS)
        else:
            rms = matrix.norm(dim=1, keepdim=True) / columns**0.5
            edge = matrix / ((rms if self.norm == "column" else columns * rms) + BALL_EPS)
        found: Tensor = edge.view_as(m)
        return found


@dataclass(frozen=True)
class ScionLight(Scion):
    """Scion with the gradient's buffer for its only state (same paper, authors' code).

    d <- (1 - a) d + g;  u = scale edge(d), and the rest as scion

    d is m / a, of which every edge is the same. In a loop that never clears gradients it is .grad
    itself, to which the backward pass adds what is new, and no memory beside it is needed; but then
    whoever clips or reads gradients has the sum of all. Where they are cleared (set to None), the
    optimizer holds the (1 - a) d that the last step left, and adds it to the new ones in the step.
    """

    keeps_gradient: ClassVar[bool] = True

    def init(self, param: Tensor) -> State:
        """Return nothing."""
        return {}

    def update(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> tuple[Tensor, State]:
        """Return the point of the ball that is farthest along the sum of gradients."""
        return h.scale * self._edge(grad), {"grad": (1 - h.momentum) * grad}


def _for_the_rest(rule: type[Scion]) -> tuple[Part, ...]:
    return (
        Part("embedding", frozenset({Role.EMBEDDING}), rule(norm="column"), follows=True),
        Part("head", frozenset({Role.HEAD}), rule(norm="sign", scale=3000.0), follows=True),
        Part("vector", frozenset({Role.VECTOR}), rule(norm="rms"), follows=True),
    )


RECIPES = (
    Recipe(
        "dion",
        Dion(),
        family="spectral",
        year=2025,
        paper="Ahn et al., arXiv:2504.05295",
        state="4 * m * n + 4 * n * min(rank, m, n) + 8",
        parts=(adam_for_the_rest(HIDDEN, AdamW(lr=1e-3, weight_decay=0.01, betas=(0.9, 0.95))),),
        differs=(
            "The authors' distributed code transposes matrices of fewer rows than columns, names "
            "the rank as a fraction, and has a randomised Cholesky QR.",
        ),
    ),
    Recipe(
        "scion",
        Scion(),
        family="spectral",
        year=2025,
        paper="Pethick et al., arXiv:2502.07529",
        state="4 * m * n",
        parts=_for_the_rest(Scion),
        differs=(
            "EPFL's llm-optimizer-benchmark has max(1, .) in the spectral factor, a sign that is "
            "not divided, and momentum 0.9, which means almost none.",
            "pytorch-optimizer's is unconstrained with scale 1 unless told.",
            "Levanter's is Signum on embedding and head.",
        ),
    ),
    Recipe(
        "scion_light",
        ScionLight(),
        family="spectral",
        year=2025,
        paper="Pethick et al., arXiv:2502.07529",
        state="0",
        parts=_for_the_rest(ScionLight),
        differs=(
            "EPFL's llm-optimizer-benchmark clears the gradients at every step, and so the "
            "momentum.",
        ),
    ),
)
