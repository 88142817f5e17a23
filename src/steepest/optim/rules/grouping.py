"""Learning rates scaled by groups of like momenta."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from steepest.optim.live import Hyper
from steepest.optim.recipe import Recipe
from steepest.optim.rule import Rule, State, ema
from steepest.optim.rules.adam import AdamW
from steepest.optim.rules.adam_by_tensor import LAMB
from steepest.optim.rules.shampoo import Shampoo
from steepest.optim.rules.wrappers import Redirecting
from steepest.optim.wrapper import overrides

LLOYD = 10
"""Iterations of k-means."""


@dataclass(frozen=True)
class Grouped(Redirecting):
    """SGG, scaling with gradient grouping (Li et al., 2025, arXiv:2506.01049, Algorithm 1).

    every `recluster_interval` steps, from the method's moment m of each matrix:
      its elements fall into `n_clusters` clusters of like value, by k-means
      d_c = median of |m - mean(m)| in cluster c, d = the same over all matrices
      s_c <- beta3 s_c + (1 - beta3) clip(d / (d_c + 1e-8), scale_bound), s_c = 1 at first
    u <- s_c u for the elements of cluster c

    Around LAMB the whole step is scaled, trust ratio and decay inside. Vectors and scalars are
    stepped by the method alone. Clusters are found anew each time, from the values at the middle of
    equal parts of the sorted elements, where the paper has mini-batch k-means. A recluster
    takes as much memory as a copy of the parameters for the median over all of them.
    """

    n_clusters: int = 3
    recluster_interval: int = 500
    beta3: float = 0.99
    scale_bound: tuple[float, float] = (0.1, 10.0)

    prefix: ClassVar[str] = "sgg"

    def init(self, param: Tensor) -> State:
        """Return the method's state, and of matrices each element's cluster and their scales."""
        state = self.inner.init(param)
        if param.ndim < 2:
            return state
        return {
            **state,
            "cluster": torch.zeros_like(param, dtype=torch.uint8),
            "cluster_scale": param.new_ones(self.n_clusters),
        }

    def scalars(self, step: int, values: Mapping[str, Any]) -> dict[str, float]:
        """Return those of the method, and which work (1 or 0) is due before this step."""
        return {
            **self.inner.scalars(step, values),
            "reclusters": float(self.measures(step)),
            "inner_prepares": float(self.inner.prepares(step)),
        }

    def shared(self) -> dict[str, float]:
        """Return the median deviation over all matrices, not known yet."""
        return {"deviation": 0.0}

    def measures(self, step: int) -> bool:
        """Every `recluster_interval` steps."""
        return step % self.recluster_interval == 0

    def measure(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> dict[str, Tensor]:
        """Return the deviations of a matrix."""
        if param.ndim < 2:
            return {"deviations": grad.new_zeros(0)}
        return {"deviations": _deviations(self._moment(grad, param, state, h))}

    def combine(self, sums: Mapping[str, Tensor], h: Hyper) -> dict[str, Tensor]:
        """Return the median of all deviations."""
        found = sums["deviations"]
        return {"deviation": found.median(-1).values.double() if len(found) else h.deviation}

    def prepares(self, step: int) -> bool:
        """When clusters or the method are due."""
        return self.measures(step) or self.inner.prepares(step)

    def prepare(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> State:
        """Return the new clusters and scales, and what the method prepares, each where due."""
        new: State = {}
        if overrides(self.inner, "prepare"):
            for name, value in self.inner.prepare(grad, param, state, h).items():
                new[name] = torch.where(h.inner_prepares > 0, value, state[name])
        if param.ndim >= 2:
            for name, value in self._recluster(grad, param, state, h).items():
                new[name] = torch.where(h.reclusters > 0, value, state[name])
        return new

    def update(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> tuple[Tensor, State]:
        """Return the method's direction, each element scaled as its cluster."""
        direction, new = self.directed(grad, param, state, h)
        if param.ndim < 2:
            return direction, new
        scale = state["cluster_scale"][0]
        for c in range(1, self.n_clusters):
            scale = torch.where(state["cluster"] == c, state["cluster_scale"][c], scale)
        return scale * direction, new

    def _moment(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> Tensor:
        """Return the method's average of gradients after this one."""
        return self.inner.update(grad, param, state, h)[1]["exp_avg"].flatten()

    def _recluster(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> State:
        moment = self._moment(grad, param, state, h)
        labels, deviations = clusters(moment, self.n_clusters), _deviations(moment)
        low, high = self.own(h, "scale_bound")
        scales = []
        for c, old in enumerate(state["cluster_scale"].unbind(0)):
            mine = labels == c
            median = torch.where(mine, deviations, torch.nan).nanmedian(-1).values
            ratio = (h.deviation / (median + 1e-8)).clamp(min=low, max=high)
            scales.append(torch.where(mine.any(), ema(old, ratio, self.own(h, "beta3")), old))
        return {
            "cluster": labels.to(torch.uint8).view_as(grad),
            "cluster_scale": torch.stack(scales).to(grad.dtype),
        }


def _deviations(moment: Tensor) -> Tensor:
    return (moment - moment.mean()).abs().flatten()


def clusters(values: Tensor, count: int) -> Tensor:
    """Return the cluster of each value, 1-D, by k-means; in ascending order."""
    n = len(values)
    middles = [(2 * i + 1) * n // (2 * count) for i in range(count)]
    centres = torch.stack([values.kthvalue(middle + 1).values for middle in middles])
    for _ in range(LLOYD):
        labels = _nearest(values, centres)
        moved = []
        for c, old in enumerate(centres.unbind(0)):
            mine = labels == c
            mean = torch.where(mine, values, 0.0).sum() / mine.sum()
            moved.append(torch.where(mine.any(), mean, old))
        centres = torch.stack(moved)
    return _nearest(values, centres)


def _nearest(values: Tensor, centres: Tensor) -> Tensor:
    """Return the number of the nearest centre, the lower of two."""
    midpoints = (centres[1:] + centres[:-1]) / 2
    return (values.unsqueeze(-1) > midpoints).sum(-1)


def grouped(name: str, inner: Rule, state: str, *differs: str) -> Recipe:
    """Return the recipe of a method with grouped learning rates."""
    return Recipe(
        name,
        Grouped(inner=inner),
        family="gradient grouping",
        year=2025,
        paper="Li et al., arXiv:2506.01049",
        state=f"{state} + m * n + 4 * n_clusters",
        differs=(
            *differs,
            "The paper does not say what the global deviation is the median of: here of all "
            "elements, while one reading takes it of the clusters' medians.",
            "The AdamWSGG and LambSGG that circulate cluster |m|, scale by means within the layer "
            "and nothing global, and scale LAMB's direction before its trust ratio.",
            "OpenRaiser/scaling-for-scaling rescales gradients by log1p(|w| / |g|) against a "
            "median frozen at the first step.",
        ),
    )


RECIPES = (
    grouped("sgg_adamw", AdamW(weight_decay=0.0), "(12 if amsgrad else 8) * m * n"),
    grouped("sgg_lamb", LAMB(weight_decay=0.0), "8 * m * n"),
    grouped(
        "sgg_shampoo",
        Shampoo(weight_decay=0.0),
        "4 * m * n + sum(8 * side * side for side in (m, n) if side <= max_precond_dim)"
        " + (4 * m * n if grafting == 'adam' or (grafting == 'none' and min(m, n) >"
        " max_precond_dim) else 0)",
        "The sgg_shampoo of OpenRaiser/scaling-for-scaling is Newton-Schulz of momentum.",
    ),
)
