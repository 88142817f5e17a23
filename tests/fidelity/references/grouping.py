"""Methods that scale learning rates by groups of parameters, from their papers."""

from __future__ import annotations

from typing import Any

import numpy as np

from references.adam import AdamW
from references.adam_variants import LAMB
from references.base import Array, GroupReference, Reference
from references.kronecker import Shampoo


class SGG(GroupReference):
    """Li et al. 2025 (arXiv:2506.01049), Algorithm 1, around a base method with momentum.

    At every `recluster_interval`-th step (T), from the momenta m_l after that step's gradient
    and for that very step: the elements of each m_l are put in `n_clusters` clusters by value;
      D_lc = median over cluster c of |m_l - mean(m_l)|          (5)
      D    = median over all elements of all layers of |m_l - mean(m_l)|
      S_lc <- beta3 S_lc + (1 - beta3) clip(D / (D_lc + 1e-8), scale_bound),  S_lc = 1 at first  (7)
    and each element's learning rate is multiplied by the S of its cluster: that of the last
    clustering, 1 before the first.

    * Layers are tensors with two or more dimensions; vectors and scalars take the base's step and
      don't count in D (appendix A). D needs all parameters at once. The paper's "global MDA
      which characterizes the typical parameter-wise deviation throughout the model" is read as a
      median of elements, not of the D_lc.
    * m is the base's own average of gradients, with its sign and without bias correction.
    * What is multiplied is the direction, where decay is decoupled (AdamW, Shampoo): x <- x -
      lr (S u + wd x). Of LAMB it is the whole step, trust ratio and decay inside: the norm of the
      step is then no longer lr |x|.
    * Medians are the lower of the middle two, as torch.median: element (n - 1) // 2 of the sorted.
    * Clusters are numbered by ascending centre. Clipped first, averaged then. A cluster without
      elements keeps its S.

    Clustering is deterministic where the paper has scikit-learn's MiniBatchKMeans (random
    batches of 128, random_state 42, centres kept from one clustering to the next): k-means in
    one dimension, afresh each time. Initial centre i of K is element ((2 i + 1) n) // (2 K) of
    the n sorted values (their mid-quantiles); 10 Lloyd iterations; each assigns a value to the
    cluster numbered by how many midpoints of neighbouring centres are below it (on the midpoint:
    the lower cluster) and moves centres to means (an empty cluster's stays); then values are
    assigned once more. An element near a midpoint may be put elsewhere in another precision:
    `margins`, per tensor and element, is its least distance from a midpoint so far, relative
    to the largest |m|.

    Different: the "version 2" that circulates (AdamWSGG, LambSGG) clusters |m|, and S is the
    layer's mean |m| over the cluster's (no medians, nothing global, clipped after averaging), and
    multiplies LAMB's step before its trust ratio; OpenRaiser/scaling-for-scaling
    rescales gradients by log1p(|w| / |g|), has a factor per parameter group against a median
    frozen at step 1, replaces S instead of averaging, couples decay, clips the trust ratio
    of LAMB, and its sgg_shampoo is Newton-Schulz of momentum.

    Defaults: lr 1e-3, weight_decay 0 (T is 1 to 5 % of the steps, beta3 0.99, K 2 or 3: paper)
    """

    base: type[Reference]

    def begin(
        self,
        n_clusters: int,
        recluster_interval: int,
        beta3: float,
        scale_bound: tuple[float, float],
        **base_hyper: Any,
    ) -> None:
        """Make a base method for every parameter."""
        self.k, self.interval, self.beta3 = n_clusters, recluster_interval, beta3
        self.bound = scale_bound
        self.inner = [
            self.base(x, weight_decay=wd, draw=self.draw, **base_hyper)
            for x, wd in zip(self.xs, self.weight_decays, strict=True)
        ]
        self.layers = [i for i, x in enumerate(self.xs) if x.ndim >= 2]
        self.scales = {i: np.ones(n_clusters) for i in self.layers}
        self.labels = {i: np.zeros(self.xs[i].shape, dtype=int) for i in self.layers}
        self.margins = [np.full_like(x, np.inf) for x in self.xs]

    def step(self, grads: list[Array], lr: float) -> None:
        self.t += 1
        decoupled = self.base.step is Reference.step
        steps: list[Array] = []
        for inner, grad in zip(self.inner, grads, strict=True):
            g = np.asarray(grad, dtype=np.float64)
            if decoupled:
                inner.t += 1
                steps.append(-lr * inner.direction(g))
            else:
                before = inner.x
                inner.step(g, lr)
                steps.append(inner.x - before)
                inner.x = before
        if self.t % self.interval == 0 and self.layers:
            self.recluster()
        for i, (inner, change) in enumerate(zip(self.inner, steps, strict=True)):
            scale = self.scales[i][self.labels[i]] if i in self.scales else 1.0
            decay = lr * inner.weight_decay * inner.x if decoupled else 0.0
            inner.x = inner.x + scale * change - decay
        self.xs = [inner.x for inner in self.inner]

    def recluster(self) -> None:
        momenta = {i: self.inner[i].m for i in self.layers}
        deviations = {i: np.abs(m - m.mean()) for i, m in momenta.items()}
        everywhere = lower_median(np.concatenate([d.ravel() for d in deviations.values()]))
        for i, m in momenta.items():
            flat, margin = clusters(m.ravel(), self.k)
            self.labels[i] = flat.reshape(m.shape)
            self.margins[i] = np.minimum(self.margins[i], margin.reshape(m.shape))
            for c in range(self.k):
                members = deviations[i][self.labels[i] == c]
                if members.size:
                    ratio = np.clip(everywhere / (lower_median(members) + 1e-8), *self.bound)
                    self.scales[i][c] = self.beta3 * self.scales[i][c] + (1 - self.beta3) * ratio


def lower_median(values: Array) -> float:
    return float(np.sort(values)[(len(values) - 1) // 2])


def clusters(values: Array, k: int, iterations: int = 10) -> tuple[Array, Array]:
    """Return each value's cluster, 0 to k - 1 in ascending order, and its margin."""
    n = len(values)
    centres = np.sort(values)[[(2 * i + 1) * n // (2 * k) for i in range(k)]]
    for _ in range(iterations):
        labels = np.searchsorted((centres[1:] + centres[:-1]) / 2, values, side="left")
        for c in range(k):
            if np.any(labels == c):
                centres[c] = values[labels == c].mean()
    midpoints = (centres[1:] + centres[:-1]) / 2
    margin = np.full(n, np.inf)
    if k > 1 and np.any(values):
        margin = np.abs(values[:, None] - midpoints).min(axis=1) / np.abs(values).max()
    return np.searchsorted(midpoints, values, side="left"), margin


class SGGAdamW(SGG):
    __doc__ = SGG.__doc__
    base = AdamW

    def setup(
        self,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        n_clusters: int = 3,
        recluster_interval: int = 500,
        beta3: float = 0.99,
        scale_bound: tuple[float, float] = (0.1, 10.0),
    ) -> None:
        self.begin(n_clusters, recluster_interval, beta3, scale_bound, betas=betas, eps=eps)


class SGGLAMB(SGG):
    __doc__ = SGG.__doc__
    base = LAMB

    def setup(
        self,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        n_clusters: int = 3,
        recluster_interval: int = 500,
        beta3: float = 0.99,
        scale_bound: tuple[float, float] = (0.1, 10.0),
    ) -> None:
        self.begin(n_clusters, recluster_interval, beta3, scale_bound, betas=betas, eps=eps)


class SGGShampoo(SGG):
    __doc__ = SGG.__doc__
    base = Shampoo

    def setup(
        self,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        shampoo_beta: float | None = None,
        eps: float = 1e-12,
        exponent: float | None = None,
        accumulate: str = "ema",
        grafting: str = "adam",
        graft_eps: float = 1e-8,
        update_interval: int = 100,
        start_preconditioning_step: int | None = None,
        max_precond_dim: int = 8192,
        n_clusters: int = 3,
        recluster_interval: int = 500,
        beta3: float = 0.99,
        scale_bound: tuple[float, float] = (0.1, 10.0),
    ) -> None:
        self.begin(
            n_clusters,
            recluster_interval,
            beta3,
            scale_bound,
            betas=betas,
            shampoo_beta=shampoo_beta,
            eps=eps,
            exponent=exponent,
            accumulate=accumulate,
            grafting=grafting,
            graft_eps=graft_eps,
            update_interval=update_interval,
            start_preconditioning_step=start_preconditioning_step,
            max_precond_dim=max_precond_dim,
        )


REFERENCES: dict[str, type] = {
    "sgg_adamw": SGGAdamW,
    "sgg_lamb": SGGLAMB,
    "sgg_shampoo": SGGShampoo,
}
