"""APOLLO's random projections, and low-rank methods with int8 weights, from their papers.

Sides, refresh steps and hidden matrices only: as in `low_rank`.
"""

from __future__ import annotations

import numpy as np

from references.base import Array, Reference
from references.low_rank import GaLoreAdamW8bit, GrowthLimiter, LowRank, channel_ratio


class Apollo(LowRank):
    """Zhu et al., APOLLO (2024, arXiv:2412.05270), Algorithm 1 with the limiter of eq. 4.

    At steps 1, 1 + update_interval, ...: P = draw("normal", t, shape) / sqrt(rank), of shape
    [rank, n] on the right, [m, rank] on the left. R = G P^T or P^T G; m, v of R, kept when P
    changes; A = m / (sqrt(v) + eps); s_j = |A_j| / (|R_j| + 1e-8) per channel j (row of a
    right-projected matrix, else column); u = scale c limited(s G) with
    c = sqrt(1 - b2^t) / (1 - b1^t). The paper has no bias correction: as in apollo_torch 1.0.3,
    after the limiter. `rank` is taken literally, also above min(m, n), where it saves nothing.

    `scale` is the paper's alpha: apollo_torch multiplies by sqrt(its scale). Its `scale_front` only
    says on which side of the limiter, and ratios of norms do not see a constant factor.
    `scale_type` "tensor" takes one ratio |A| / (|R| + 1e-8) for the whole matrix.
    After a step without gradient the limiter starts again from 1e-8 and all but stops the matrix
    (1.01^1850 = 1e8); the authors' code does that too.
    pytorch_optimizer 4.1 scales the low-rank gradient and projects it back (not the paper's s G).

    Defaults: lr 1e-2, weight_decay 0
    """

    def setup(
        self,
        *,
        rank: int = 256,
        update_interval: int = 200,
        scale: float = 1.0,
        scale_type: str = "channel",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        growth_limit: float = 1.01,
    ) -> None:
        self.begin(rank, update_interval, scale)
        self.scale_type = scale_type
        self.betas, self.eps, self.limiter = betas, eps, GrowthLimiter(growth_limit)

    def projection(self, source: Array) -> Array:
        shape = (self.rank, self.columns) if self.right else (self.rows, self.rank)
        assert self.draw is not None
        return self.draw("normal", self.t, shape) / np.sqrt(self.rank)

    def update(self, g: Array) -> Array:
        r = self.down(g)
        self.moments(r)
        adapted, after = self.adapted()
        axis = self.channel_axis if self.scale_type == "channel" else None
        return after * self.limiter(channel_ratio(adapted, r, axis) * g)

    def adapted(self) -> tuple[Array, float]:
        """Return Adam's direction as the ratios see it, and the factor after the limiter."""
        return self.m / (np.sqrt(self.v) + self.eps), self.correction()


class ApolloMini(Apollo):
    """APOLLO-Mini (2024, arXiv:2412.05270), Algorithm 1: rank 1, one ratio for the whole tensor.

    s = |A| / (|R| + 1e-8), scale = sqrt(128) (apollo_torch: scale=128). The rest is `Apollo`.

    Defaults: lr 1e-2, weight_decay 0
    """

    def setup(
        self,
        *,
        rank: int = 1,
        update_interval: int = 200,
        scale: float = 128**0.5,
        scale_type: str = "tensor",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        growth_limit: float = 1.01,
    ) -> None:
        super().setup(
            rank=rank,
            update_interval=update_interval,
            scale=scale,
            scale_type=scale_type,
            betas=betas,
            eps=eps,
            growth_limit=growth_limit,
        )


class Int8Weights(Reference):
    """Weights that are int8 between steps, in groups, rounded stochastically at every step.

    x <- Q(x - lr (u + weight_decay x)) with draw("uniform", t, shape of x); see `round_groups`.
    x is the value that the codes stand for. What is given at first is not rounded (the authors
    round their models to nearest before training). `margin` is, per element, how near a rounding
    was to going the other way, in units of a code: below a precision's error it can't be compared.
    """

    group_size: int
    margin: Array | float = np.inf

    def step(self, grad: Array, lr: float) -> None:
        """Move as usual, then round."""
        super().step(grad, lr)
        uniform = self.draw("uniform", self.t, self.x.shape)
        self.x, margin = round_groups(self.x, 8, self.group_size, uniform)
        self.margin = np.minimum(self.margin, margin)


def round_groups(
    values: Array, bits: int, group_size: int, uniform: Array | None = None
) -> tuple[Array, Array]:
    """Return what the codes of the values, read row by row in groups, stand for; and margins.

    Per group, with top = 2^bits - 1:  s = max(max - min, 1e-5) / top;
    z = clamp(-round(min / s), 0, top);  code = clamp(round(w / s) + z, 0, top);  w = (code - z) s.
    Rounds half to even; with `uniform`, w / s goes up where uniform < its fraction, else down.
    A group whose values have one sign is clamped to a range from zero (as the authors' code).
    The authors need a multiple of the group size; we leave the last group shorter.
    """
    flat, out, top = values.ravel(), np.empty(values.size), 2.0**bits - 1
    margin = np.empty(values.size)
    for start in range(0, flat.size, group_size):
        part = slice(start, start + group_size)
        w = flat[part]
        s = max(w.max() - w.min(), 1e-5) / top
        z = np.clip(-np.round(w.min() / s), 0, top)
        fraction = w / s - np.floor(w / s)
        if uniform is None:
            code, margin[part] = np.round(w / s), np.abs(fraction - 0.5)
        else:
            chance = uniform.ravel()[part]
            code = np.floor(w / s) + (chance < fraction)
            margin[part] = np.abs(fraction - chance)
        out[part] = (np.clip(code + z, 0, top) - z) * s
    return out.reshape(values.shape), margin.reshape(values.shape)


class QApollo(Int8Weights, Apollo):
    """Q-APOLLO (2024, arXiv:2412.05270, section 5.3): APOLLO on int8 weights, states in 32 bits.

    As in apollo_torch 1.0.3, whose quantised version has bitsandbytes' Adam: ratios of
    A = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps), so bias correction comes before the
    limiter, where `Apollo` has it after. Groups of 128 in the paper, of 256 by default in scripts.
    `scale_type` "channel", or "tensor" with rank 1 and scale sqrt(128) for Q-APOLLO-Mini.

    Defaults: lr 1e-2, weight_decay 0
    """

    def setup(
        self,
        *,
        rank: int = 256,
        update_interval: int = 200,
        scale: float = 1.0,
        scale_type: str = "channel",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        growth_limit: float = 1.01,
        group_size: int = 128,
    ) -> None:
        super().setup(
            rank=rank,
            update_interval=update_interval,
            scale=scale,
            scale_type=scale_type,
            betas=betas,
            eps=eps,
            growth_limit=growth_limit,
        )
        self.group_size = group_size

    def adapted(self) -> tuple[Array, float]:
        b1, b2 = self.betas
        m_hat, v_hat = self.m / (1 - b1**self.t), self.v / (1 - b2**self.t)
        return m_hat / (np.sqrt(v_hat) + self.eps), 1.0


class QGaLore(Int8Weights, GaLoreAdamW8bit):
    """Zhang et al., Q-GaLore (2024, arXiv:2407.08296), section 3.5: galore_adamw8bit on int8
    weights with a projection of `projection_bits`, rounded to nearest in the same groups.

    The rounded P is used down and up; it is no longer orthogonal. Codes of P depend on the signs of
    singular vectors at every refresh, the first included. `adopt` takes P before it is rounded.

    Lazy refresh: the interval, at first `update_interval`, is doubled at a refresh where |cosine|
    of successive first singular vectors (before rounding) has averaged at least `cos_threshold`
    over the last `queue_size` refreshes. A refresh is due where steps before this one divide by the
    interval. As in the authors' projector, whose cosine keeps the sign that the SVD gives.

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
        projection_bits: int = 4,
        group_size: int = 256,
        cos_threshold: float = 0.4,
        queue_size: int = 5,
        block_size: int = 256,
    ) -> None:
        super().setup(
            rank=rank,
            update_interval=update_interval,
            scale=scale,
            betas=betas,
            eps=eps,
            block_size=block_size,
        )
        self.projection_bits, self.group_size = projection_bits, group_size
        self.cos_threshold, self.queue_size = cos_threshold, queue_size
        self.leading: Array | None = None
        self.cosines: list[float] = []

    def projection(self, g: Array) -> Array:
        exact = self.singular_basis(g)
        leading = exact[0] if self.right else exact[:, 0]
        if self.leading is not None:
            self.cosines.append(abs(float(self.leading @ leading)))
        self.leading = leading
        latest = self.cosines[-self.queue_size :]
        if len(latest) == self.queue_size and np.mean(latest) >= self.cos_threshold:
            self.interval *= 2
        return round_groups(exact, self.projection_bits, self.group_size)[0]


REFERENCES = {
    "apollo": Apollo,
    "apollo_mini": ApolloMini,
    "q_apollo": QApollo,
    "q_galore": QGaLore,
}
