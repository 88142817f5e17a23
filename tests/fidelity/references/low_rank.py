"""Adam and Adafactor in the gradient's singular basis: GaLore, Fira, Conda, from their papers.

All are given hidden matrices [out, in] only (embeddings, head and vectors get AdamW); more than two
dimensions are a matrix of the first against the rest. A matrix [m, n] is projected from the right
when m >= n, else from the left, as in the authors' codes (the papers write m <= n and the left).

The basis is renewed at steps 1, 1 + update_interval, 1 + 2 update_interval, ..., before it is used,
from the singular vectors of largest singular values. `rank` >= min(m, n) means all min(m, n) of
them: a square orthogonal basis, nothing is cut off, and state is at least that of Adam.

Signs: first moments in the basis (galore_adamw, its 8-bit version, Fira) outlive it, so from the
second refresh on the result depends on the sign of each singular vector, which an SVD leaves open.
Ours make the entry of largest size positive. In galore_adafactor without beta1 and in Conda signs
cancel. A rule with other signs, or a case where the basis is not determined (equal singular values,
a gradient of lower rank than `rank`), is compared after `adopt`, called before the `step` that
refreshes with the basis that the rule then uses. `gap` says how well it is determined.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from references.base import Array, Reference
from references.light import MIN_QUANTISED, EightBit

NORM_EPS = 1e-8
"""Added to the norms that Fira and APOLLO divide by (their codes; Fira's paper has Adam's eps)."""


class LowRank(Reference):
    """What the family shares: sides, the singular basis, and Adam's moments in it.

    `basis` is [rank, n] on the right (rows are singular vectors), [m, rank] on the left.
    `gap` is the smallest distance, so far, of neighbours among the largest rank + 1 singular
    values, over the largest: singular vectors are known to about rounding error / gap.
    """

    def begin(self, rank: int | None, update_interval: int, scale: float) -> None:
        assert self.x.ndim > 1, "given hidden matrices only"
        self.rows, self.columns = len(self.x), self.x[0].size
        self.right = self.rows >= self.columns
        self.rank = min(self.rows, self.columns) if rank is None else rank
        self.interval, self.scale = update_interval, scale
        self.basis = np.zeros(0)
        self.offered: tuple[Array, float] | None = None
        self.gap = np.inf
        self.m: Any = 0.0
        self.v: Any = 0.0

    def direction(self, g: Array) -> Array:
        matrix = g.reshape(self.rows, self.columns)
        source = self.source(matrix)
        if (self.t - 1) % self.interval == 0:
            self.basis = self.projection(source)
        return (self.scale * self.update(matrix)).reshape(g.shape)

    def source(self, g: Array) -> Array:
        """Return what the basis would be taken from: the gradient, unless a method says another."""
        return g

    def projection(self, source: Array) -> Array:
        """Return the basis of a refresh."""
        return self.singular_basis(source)

    def update(self, g: Array) -> Array:
        """Return the direction of a matrix, before `scale`."""
        raise NotImplementedError

    @property
    def channel_axis(self) -> int:
        """The axis of the low-rank gradient that has `rank` entries."""
        return 1 if self.right else 0

    def down(self, g: Array) -> Array:
        return g @ self.basis.T if self.right else self.basis.T @ g

    def up(self, r: Array) -> Array:
        return r @ self.basis if self.right else self.basis @ r

    def moments(self, r: Array) -> None:
        b1, b2 = self.betas
        self.m = b1 * self.m + (1 - b1) * r
        self.v = b2 * self.v + (1 - b2) * r**2

    def adam(self, m: Array) -> Array:
        """Return Adam's direction for a first moment; eps is of the uncorrected sqrt(v)."""
        return self.correction() * m / (np.sqrt(self.v) + self.eps)

    def correction(self) -> float:
        """Return Adam's two bias corrections in one."""
        b1, b2 = self.betas
        return float(np.sqrt(1 - b2**self.t) / (1 - b1**self.t))

    def singular_basis(self, matrix: Array) -> Array:
        """Return the leading singular vectors, the largest entry of each positive."""
        u, sizes, vt = np.linalg.svd(matrix, full_matrices=False)
        leading = sizes[: self.rank + 1]
        if len(leading) > 1:
            self.gap = min(self.gap, float(-np.diff(leading).max()) / max(leading[0], 1e-300))
        vectors = (vt.T if self.right else u)[:, : self.rank]
        largest = np.abs(vectors).argmax(axis=0)
        vectors = vectors * np.sign(vectors[largest, np.arange(vectors.shape[1])])
        if self.offered is not None:
            basis, tolerance = self.offered
            self.offered = None
            pair = (basis, matrix) if self.right else (basis.T, matrix.T)
            assert_singular_rows(*pair, sizes, tolerance)
            return basis
        return vectors.T if self.right else vectors

    def adopt(self, basis: Array, tolerance: float = 1e-9) -> None:
        """Take the implementation's next basis, if it is made of leading singular vectors."""
        assert self.t % self.interval == 0, "the next step does not refresh"
        self.offered = np.array(basis, dtype=np.float64), tolerance


def assert_singular_rows(rows: Array, matrix: Array, sizes: Array, tolerance: float) -> None:
    """Check that the rows are right singular vectors of the matrix, of the largest sizes."""
    np.testing.assert_allclose(rows @ rows.T, np.eye(len(rows)), atol=tolerance)
    image = rows @ matrix.T
    expected = np.diag(sizes[: len(rows)] ** 2)
    np.testing.assert_allclose(image @ image.T, expected, rtol=0, atol=tolerance * sizes[0] ** 2)


class GaLoreAdamW(LowRank):
    """Zhao et al., GaLore (2024, arXiv:2403.03507), Algorithm 2, as in galore_torch 1.0.

    R = G P^T (right) or P^T G (left); m, v of R, kept when P changes;
    u = scale sqrt(1 - b2^t) / (1 - b1^t) back(m / (sqrt(v) + eps)).
    The paper corrects v before adding eps, the authors' code (transformers' old AdamW) after, which
    makes its eps larger at first (eps / sqrt(1 - b2^t)): the code is followed. It decays the moved
    weight, we the one before the step. pytorch_optimizer 4.1 counts steps from 1 and so refreshes
    at 1, interval, 2 interval, ...

    Defaults: lr 1e-2, weight_decay 0
    """

    def setup(
        self,
        *,
        rank: int = 128,
        update_interval: int = 200,
        scale: float = 0.25,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
    ) -> None:
        self.begin(rank, update_interval, scale)
        self.betas, self.eps = betas, eps

    def update(self, g: Array) -> Array:
        return self.up(self.adapt(self.down(g)))

    def adapt(self, r: Array) -> Array:
        self.moments(r)
        return self.adam(self.m)


class GaLoreAdafactor(GaLoreAdamW):
    """GaLore (arXiv:2403.03507) around Adafactor with an external lr, as in galore_torch 1.0.

    u = scale back(Adafactor(R)): factored second moment of R, RMS of the low-rank update clipped.
    b2 = 1 - t^-decay_rate. galore_torch has lr inside the first moment (off by default), our
    Adafactor outside: the same at a constant rate only.

    Defaults: lr 1e-2, weight_decay 0
    """

    def setup(
        self,
        *,
        rank: int = 128,
        update_interval: int = 200,
        scale: float = 0.25,
        beta1: float | None = None,
        decay_rate: float = 0.8,
        clip_threshold: float = 1.0,
        eps: float = 1e-30,
    ) -> None:
        self.begin(rank, update_interval, scale)
        self.beta1, self.decay_rate, self.d, self.eps = beta1, decay_rate, clip_threshold, eps
        self.row_means: Any = 0.0
        self.column_means: Any = 0.0

    def adapt(self, r: Array) -> Array:
        b2 = 1 - self.t**-self.decay_rate
        square = r**2 + self.eps
        self.row_means = b2 * self.row_means + (1 - b2) * square.mean(axis=1)
        self.column_means = b2 * self.column_means + (1 - b2) * square.mean(axis=0)
        u = r / np.sqrt(np.outer(self.row_means, self.column_means) / self.row_means.mean())
        u = u / max(1.0, float(np.sqrt(np.mean(u**2))) / self.d)
        if self.beta1 is None:
            return u
        self.m = self.beta1 * self.m + (1 - self.beta1) * u
        return self.m


class GaLoreAdamW8bit(GaLoreAdamW):
    """GaLore (arXiv:2403.03507) with 8-bit Adam states (Dettmers et al., arXiv:2110.02861).

    u = scale back((m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)): bitsandbytes corrects before
    eps, unlike galore_adamw. The direction uses the new m and v in full precision; then each is
    stored in 8 bits per block, of the low-rank matrix read row by row, and the next step starts
    from what was stored. Fewer than 4096 elements (of the low-rank matrix) stay exact.
    float32 and float64 may pick neighbouring codes where a value is halfway between two.

    bitsandbytes has had blocks of 256 since 0.44, of 2048 when GaLore was published. galore_torch
    1.0 passes its arguments by position: with bitsandbytes 0.50 percentile_clipping=100 becomes
    max_unorm, and matrices with exact states, whose "weight" is zero there, do not move at all.

    Defaults: lr 1e-2, weight_decay 0
    """

    def setup(
        self,
        *,
        rank: int = 128,
        update_interval: int = 200,
        scale: float = 0.25,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        block_size: int = 256,
    ) -> None:
        super().setup(rank=rank, update_interval=update_interval, scale=scale, betas=betas, eps=eps)
        self.signed = EightBit(block_size, signed=True)
        self.unsigned = EightBit(block_size, signed=False)

    def adapt(self, r: Array) -> Array:
        self.moments(r)
        b1, b2 = self.betas
        m_hat, v_hat = self.m / (1 - b1**self.t), self.v / (1 - b2**self.t)
        if r.size >= MIN_QUANTISED:
            self.m, self.v = self.signed(self.m)[0], self.unsigned(self.v)[0]
        return m_hat / (np.sqrt(v_hat) + self.eps)


class Fira(LowRank):
    """Chen et al., Fira (2024, arXiv:2410.01623), Algorithm 1.

    R, S = down(G), G - back(R);  N = sqrt(1 - b2^t) / (1 - b1^t) m / (sqrt(v) + eps), Adam of R
    S <- S |N_j| / (|R_j| + 1e-8) per channel j (row of a right-projected matrix, else column)
    S <- S / max(1, |S| / (|S_last| + 1e-8) / growth_limit), |S_last| the norm after limiting
    u = scale (back(N) + S). The first step is not limited (the paper has no S_0, the code skips).

    The authors' code (fira 1.0.2; the same in pytorch_optimizer, but for its refresh steps) is
    another method: its back() includes scale everywhere, so the residual is G - scale back(R),
    which keeps most of the gradient in the subspace, and is not scaled itself; bias correction
    comes after the limiter, so its norms differ even at scale = 1. With rank >= min(m, n) S is
    rounding noise. A step without gradient resets |S_last| to 0: S grows again from 1e-8.

    Defaults: lr 1e-2, weight_decay 0
    """

    def setup(
        self,
        *,
        rank: int = 128,
        update_interval: int = 200,
        scale: float = 0.25,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        growth_limit: float = 1.01,
    ) -> None:
        self.begin(rank, update_interval, scale)
        self.betas, self.eps, self.limiter = betas, eps, GrowthLimiter(growth_limit)

    def update(self, g: Array) -> Array:
        r = self.down(g)
        self.moments(r)
        n = self.adam(self.m)
        rest = channel_ratio(n, r, self.channel_axis) * (g - self.up(r))
        return self.up(n) + self.limiter(rest)


class GrowthLimiter:
    """Fira's limiter: a norm grows by at most `limit` a step; the first is free."""

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.last: float | None = None

    def __call__(self, s: Array) -> Array:
        norm, cut = float(np.linalg.norm(s)), 1.0
        if self.last is not None:
            cut = max(norm / (self.last + NORM_EPS), self.limit) / self.limit
        self.last = norm / cut
        return s / cut


def channel_ratio(adapted: Array, r: Array, axis: int | None) -> Array:
    """Return how much Adam scaled each channel of the low-rank gradient (all of it: axis None)."""
    keep = axis is not None
    before = np.linalg.norm(r, axis=axis, keepdims=keep)
    return np.linalg.norm(adapted, axis=axis, keepdims=keep) / (before + NORM_EPS)


class Conda(LowRank):
    """Wang et al., column-normalised Adam (2025, arXiv:2509.24218), from the authors' code.

    m <- b1 m + (1 - b1) G, not projected; at a refresh Q from the SVD of that m, all min(m, n)
    singular vectors of the shorter side; v <- b2 v + (1 - b2) down(G)^2, kept when Q changes;
    u = scale sqrt(1 - b2^t) / (1 - b1^t) back(down(m) / (sqrt(v) + eps)).
    Signs of Q cancel, its order does not. Zero or equal singular values of m (a first gradient of
    low rank) leave Q open: `adopt`. pytorch_optimizer 4.1 refreshes at 1, interval, 2 interval.
    A `rank` given to public benchmarks' Conda is ignored: there is none.

    Defaults: lr 1e-2, weight_decay 0
    """

    def setup(
        self,
        *,
        update_interval: int = 2000,
        scale: float = 0.25,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
    ) -> None:
        self.begin(None, update_interval, scale)
        self.betas, self.eps = betas, eps

    def source(self, g: Array) -> Array:
        b1 = self.betas[0]
        self.m = b1 * self.m + (1 - b1) * g
        return self.m

    def update(self, g: Array) -> Array:
        b2 = self.betas[1]
        self.v = b2 * self.v + (1 - b2) * self.down(g) ** 2
        return self.up(self.adam(self.down(self.m)))


REFERENCES = {
    "galore_adamw": GaLoreAdamW,
    "galore_adafactor": GaLoreAdafactor,
    "galore_adamw8bit": GaLoreAdamW8bit,
    "fira": Fira,
    "conda": Conda,
}
