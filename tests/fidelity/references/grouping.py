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
    assigned once more. An element near a midpoint may be put elsewhere in another precision.

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
        self.decays_itself = self.base.step is not Reference.step
        self.inner = [
            self.base(x, weight_decay=wd if self.decays_itself else 0.0, **base_hyper)
            for x, wd in zip(self.xs, self.weight_decays, strict=True)
        ]
        self.scales = [np.ones(n_clusters) for _ in self.xs]
        self.labels = [np.zeros(x.shape, dtype=int) for x in self.xs]

    def step(self, grads: list[Array], lr: float) -> None:
        self.t += 1
        moves = []
        for inner, x, g in zip(self.inner, self.xs, grads, strict=True):
            inner.x = x
            inner.step(g, lr)
            moves.append(inner.x - x)
        if self.t % self.interval == 0:
            self.recluster()
        for i, (x, move) in enumerate(zip(self.xs, moves, strict=True)):
            decay = 0.0 if self.decays_itself else lr * self.weight_decays[i]
            self.xs[i] = x + self.scales[i][self.labels[i]] * move - decay * x

    def recluster(self) -> None:
        layers = {i: self.inner[i].m for i, x in enumerate(self.xs) if x.ndim >= 2}
        away = {i: np.abs(m - m.mean()) for i, m in layers.items()}
        if not layers:
            return
        everywhere = lower_median(np.concatenate([d.ravel() for d in away.values()]))
        for i, m in layers.items():
            self.labels[i] = k_means(m.ravel(), self.k).reshape(m.shape)
            for c in np.unique(self.labels[i]):
                ratio = everywhere / (lower_median(away[i][self.labels[i] == c]) + 1e-8)
                new = np.clip(ratio, *self.bound)
                self.scales[i][c] = self.beta3 * self.scales[i][c] + (1 - self.beta3) * new


def lower_median(values: Array) -> float:
    return float(np.quantile(values, 0.5, method="inverted_cdf"))


def k_means(values: Array, k: int) -> Array:
    """Return each value's cluster, 0 to k - 1 in ascending order."""
    ranked = np.sort(values)
    centres = np.array([ranked[(2 * i + 1) * len(values) // (2 * k)] for i in range(k)])
    for _ in range(10):
        nearest = assigned(values, centres)
        for c in np.unique(nearest):
            centres[c] = values[nearest == c].mean()
    return assigned(values, centres)


def assigned(values: Array, centres: Array) -> Array:
    """Return of how many pairs of neighbouring centres a value lies above the middle."""
    return np.sum(values[:, None] > (centres[1:] + centres[:-1]) / 2, axis=1)


class SGGAdamW(SGG):
    __doc__ = SGG.__doc__
    base = AdamW

    def setup(
        self,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        amsgrad: bool = False,
        n_clusters: int = 3,
        recluster_interval: int = 500,
        beta3: float = 0.99,
        scale_bound: tuple[float, float] = (0.1, 10.0),
    ) -> None:
        base = {"betas": betas, "eps": eps, "amsgrad": amsgrad}
        self.begin(n_clusters, recluster_interval, beta3, scale_bound, **base)


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
