"""How many tokens, and how much time, a run needs to reach a loss."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from steepest.analysis.runs import Evaluation, Run


@dataclass(frozen=True)
class MeanEvaluation(Evaluation):
    """Evaluations at one step, averaged over seeds, with the lowest and highest loss."""

    lowest: float
    highest: float


def mean_curve(runs: Iterable[Run]) -> tuple[MeanEvaluation, ...]:
    """Return the validation curve averaged over the finished runs, at the steps all of them have.

    Loss, tokens and seconds are means at equal step. The last point is the final result. Where
    seeds are to be compared with a target this comes first: of single seeds, those that never reach
    it would have to be dropped, and what is left would look better than it is.
    """
    curves = [{e.step: e for e in _whole_curve(run)} for run in runs if run.finished]
    if not curves:
        return ()
    shared = sorted(set.intersection(*(set(curve) for curve in curves)))
    return tuple(_mean([curve[step] for curve in curves]) for step in shared)


def _whole_curve(run: Run) -> list[Evaluation]:
    """Return the evaluations with the result as the last one, evaluated there or not."""
    assert run.val_loss is not None
    before = [e for e in run.evaluations if e.step < run.steps]
    return [*before, Evaluation(run.steps, run.tokens, run.val_loss, run.seconds)]


def _mean(evaluations: Sequence[Evaluation]) -> MeanEvaluation:
    losses = [e.val_loss for e in evaluations]
    return MeanEvaluation(
        step=evaluations[0].step,
        tokens=round(float(np.mean([e.tokens for e in evaluations]))),
        val_loss=float(np.mean(losses)),
        seconds=float(np.mean([e.seconds for e in evaluations])),
        lowest=min(losses),
        highest=max(losses),
    )


def tokens_to_reach(curve: Sequence[Evaluation], target: float) -> float | None:
    """Return the training tokens at which `curve` first reaches `target` (nats per token).

    Between the evaluations a (above the target) and b (at or below it) the loss is taken as linear
    in tokens: x = x_a + (x_b - x_a) (loss_a - target) / (loss_a - loss_b). None if never.
    """
    return _first_crossing([e.tokens for e in curve], [e.val_loss for e in curve], target)


def seconds_to_reach(curve: Sequence[Evaluation], target: float) -> float | None:
    """Return what tokens_to_reach does, in training seconds."""
    return _first_crossing([e.seconds for e in curve], [e.val_loss for e in curve], target)


def _first_crossing(
    positions: Sequence[float], losses: Sequence[float], target: float
) -> float | None:
    for i, (position, loss) in enumerate(zip(positions, losses, strict=True)):
        if not loss <= target:
            continue
        if i == 0 or not math.isfinite(losses[i - 1]):
            return float(position)
        before, above = positions[i - 1], losses[i - 1]
        return float(before + (position - before) * (above - target) / (above - loss))
    return None


def speedup(baseline: float | None, ours: float | None) -> float | None:
    """Return baseline / ours (2 means half of the tokens, or of the time); None if unknown."""
    if baseline is None or ours is None or ours <= 0:
        return None
    return baseline / ours
