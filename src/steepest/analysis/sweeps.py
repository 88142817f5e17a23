"""How the final loss depends on the learning rate."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from steepest.analysis.runs import Run, by_optimizer

Edge = Literal["", "low", "high", "only"]


@dataclass(frozen=True)
class LrPoint:
    """One tuning run: its learning rate and final validation loss, None if it diverged."""

    lr: float
    loss: float | None
    hash: str


@dataclass(frozen=True)
class LrCurve:
    """The tuning runs of an optimizer, sorted by learning rate.

    `best_lr` has the lowest mean loss among the learning rates of which no run diverged; None if
    there is none. `at_edge` says that no lower ("low") or no higher ("high") one was tried, or no
    other at all ("only"), so the best may lie outside. A diverged run counts as tried: a grid that
    reaches the cliff has covered its side.
    """

    points: tuple[LrPoint, ...]
    best_lr: float | None
    at_edge: Edge


def lr_curves(tuning_runs: Iterable[Run]) -> dict[str, LrCurve]:
    """Return the learning-rate curve of each optimizer."""
    return {name: _curve(runs) for name, runs in by_optimizer(tuning_runs).items()}


def _curve(runs: Sequence[Run]) -> LrCurve:
    points = tuple(
        LrPoint(run.lr, run.val_loss if run.finished else None, run.hash)
        for run in sorted(runs, key=lambda run: (run.lr, run.seed, run.hash))
    )
    tried: dict[float, list[float | None]] = {}
    for point in points:
        tried.setdefault(point.lr, []).append(point.loss)
    means: dict[float, float] = {}
    for lr, losses in tried.items():
        finished = [loss for loss in losses if loss is not None]
        if len(finished) == len(losses):
            means[lr] = float(np.mean(finished))
    best = min(means, key=means.__getitem__, default=None)
    return LrCurve(points, best, edge(best, list(tried)))


def edge(lr: float | None, tried: Sequence[float]) -> Edge:
    """Return on which edge of the tried learning rates `lr` lies, if on one."""
    if lr is None or not tried:
        return ""
    if len(set(tried)) == 1:
        return "only"
    if lr >= max(tried):
        return "high"
    return "low" if lr <= min(tried) else ""
