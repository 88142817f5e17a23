"""Means over seeds and what is known of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from steepest.analysis.runs import Run
from steepest.errors import UserError

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean of `n` values; its 95 % interval is mean ± half_width.

    half_width = t(0.975, n - 1) * s / sqrt(n), with s the sample standard deviation (n - 1 in the
    denominator). It is None for n = 1: one value says nothing of its spread.
    """

    mean: float
    half_width: float | None
    n: int

    @property
    def may_be_zero(self) -> bool:
        """Whether 0 is in the interval. True where the interval is unknown."""
        return self.half_width is None or abs(self.mean) <= self.half_width


def estimate(values: Sequence[float]) -> Estimate:
    """Return the mean of `values` with its Student-t interval.

    Raises ValueError if there are none.
    """
    n = len(values)
    if n == 0:
        raise ValueError("An estimate needs at least one value.")
    mean = float(np.mean(values))
    if n == 1:
        return Estimate(mean, None, n)
    error = float(np.std(values, ddof=1)) / math.sqrt(n)
    quantile = float(stats.t.ppf(0.5 + CONFIDENCE / 2, n - 1))
    return Estimate(mean, quantile * error, n)


def paired_difference(runs: Iterable[Run], reference: Iterable[Run]) -> Estimate | None:
    """Return the mean over shared seeds of loss(runs) - loss(reference), in nats per token.

    Runs of the same seed start from the same weights and see the same batches, so what the seed
    does to both cancels. Seeds that only one side finished are left out; None if none is left.
    """
    ours, theirs = _loss_by_seed(runs), _loss_by_seed(reference)
    shared = [seed for seed in ours if seed in theirs]
    if not shared:
        return None
    return estimate([ours[seed] - theirs[seed] for seed in sorted(shared)])


def _loss_by_seed(runs: Iterable[Run]) -> dict[int, float]:
    losses: dict[int, float] = {}
    for run in runs:
        if not run.finished or run.val_loss is None:
            continue
        if run.seed in losses:
            raise UserError(
                f"Two final runs of {run.optimizer!r} have seed {run.seed}; "
                "a comparison needs one run per optimizer and seed."
            )
        losses[run.seed] = run.val_loss
    return losses
