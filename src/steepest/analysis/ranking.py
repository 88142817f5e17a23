"""The leaderboard: who is first, by how much, and who cannot be told apart.

Optimizers are sorted by mean final validation loss. Going down, each is compared with the leader of
the group above it: if the 95 % interval of their paired difference contains 0, or is unknown
because they share fewer than two seeds, it joins the group and shares its rank; else it starts a
group of its own, with its position as rank. Optimizers of which a final run diverged come after all
others, and those of which every final run diverged come last and share a rank. Groups do not cross
these borders. The intervals are those of single comparisons, not corrected for their number.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import median

from steepest.analysis.estimates import Estimate, estimate, paired_difference
from steepest.analysis.runs import Evaluation, Run, by_optimizer, final_losses
from steepest.analysis.sweeps import Edge, LrCurve, edge, lr_curves
from steepest.analysis.targets import mean_curve, seconds_to_reach, speedup, tokens_to_reach


@dataclass(frozen=True)
class Row:
    """One optimizer of the leaderboard. What its runs can't tell is None.

    Losses are in nats per token. Costs are medians over the finished final runs (over all, if none
    finished).
    """

    optimizer: str
    is_baseline: bool
    rank: int | None
    """None if there is no final run."""
    tied: bool
    """Whether others share the rank."""
    best_lr: float | None
    """Learning rate of the final runs."""
    lr_at_edge: Edge
    val_loss: Estimate | None
    """Final validation loss over the seeds that finished."""
    difference: Estimate | None
    """Paired difference to the baseline, negative if better; None for the baseline itself."""
    tokens_to_baseline: float | None
    """Tokens at which its mean curve reaches the baseline's mean final loss; None if never."""
    token_speedup: float | None
    """The baseline's own tokens to that loss, divided by these."""
    seconds_to_baseline: float | None
    time_speedup: float | None
    step_ms: float | None
    optimizer_ms: float | None
    state_bytes: float | None
    parameters: int | None
    diverged: int
    hashes: tuple[str, ...]
    """All final runs, by seed."""

    @property
    def runs(self) -> int:
        """The number of final runs."""
        return len(self.hashes)

    @property
    def perplexity(self) -> float | None:
        """exp(mean validation loss)."""
        return None if self.val_loss is None else math.exp(self.val_loss.mean)

    @property
    def state_bytes_per_parameter(self) -> float | None:
        """Optimizer state per model parameter, in bytes."""
        if self.state_bytes is None or not self.parameters:
            return None
        return self.state_bytes / self.parameters

    @property
    def rank_label(self) -> str:
        """Return "2", "2=" if the rank is shared, or "–" if there is none."""
        return "–" if self.rank is None else f"{self.rank}{'=' if self.tied else ''}"


def leaderboard(final_runs: Iterable[Run], tuning_runs: Iterable[Run], baseline: str) -> list[Row]:
    """Return one row per optimizer that has runs, and one for the baseline, best first.

    Raises UserError if an optimizer has two finished final runs of one seed.
    """
    groups = by_optimizer(sorted(final_runs, key=lambda run: (run.seed, run.hash)))
    curves = lr_curves(tuning_runs)
    for name in [*curves, baseline]:
        groups.setdefault(name, [])
    ordered = sorted(groups, key=lambda name: (_class(groups[name]), _mean(groups[name]), name))
    ranks = _ranks([groups[name] for name in ordered])
    reference = _Reference(groups[baseline])
    rows = [
        _row(
            name,
            groups[name],
            rank=rank,
            curve=curves.get(name),
            reference=reference,
            is_baseline=name == baseline,
        )
        for name, rank in zip(ordered, ranks, strict=True)
    ]
    shared = [row.rank for row in rows]
    return [replace(row, tied=row.rank is not None and shared.count(row.rank) > 1) for row in rows]


def _class(runs: Sequence[Run]) -> int:
    """Return 0 if no run diverged, 1 if some did, 2 if all did, 3 if there are no runs."""
    if not runs:
        return 3
    diverged = sum(not run.finished for run in runs)
    return 0 if diverged == 0 else 1 if diverged < len(runs) else 2


def _mean(runs: Sequence[Run]) -> float:
    losses = final_losses(runs)
    return estimate(losses).mean if losses else math.inf


def _ranks(ordered: Sequence[Sequence[Run]]) -> list[int | None]:
    ranks: list[int | None] = []
    leader: Sequence[Run] = ()
    rank = 0
    for position, runs in enumerate(ordered, start=1):
        if not runs:
            ranks.append(None)
            continue
        if not leader or not _share_rank(runs, leader):
            leader, rank = runs, position
        ranks.append(rank)
    return ranks


def _share_rank(runs: Sequence[Run], leader: Sequence[Run]) -> bool:
    if _class(runs) != _class(leader):
        return False
    difference = paired_difference(runs, leader)
    return difference is None or difference.may_be_zero


class _Reference:
    """What the others are compared with."""

    def __init__(self, runs: Sequence[Run]) -> None:
        losses = final_losses(runs)
        self.runs = runs
        self.target = estimate(losses).mean if losses else None
        self.tokens, self.seconds = self.costs_of(runs)

    def costs_of(self, runs: Sequence[Run]) -> tuple[float | None, float | None]:
        """Return the tokens and seconds in which the mean of `runs` reaches the baseline's loss."""
        if self.target is None:
            return None, None
        curve: Sequence[Evaluation] = mean_curve(runs)
        return tokens_to_reach(curve, self.target), seconds_to_reach(curve, self.target)


def _row(
    name: str,
    runs: Sequence[Run],
    *,
    rank: int | None,
    curve: LrCurve | None,
    reference: _Reference,
    is_baseline: bool,
) -> Row:
    measured = [run for run in runs if run.finished] or runs
    losses = final_losses(runs)
    lr = median(run.lr for run in runs) if runs else curve.best_lr if curve else None
    tokens, seconds = reference.costs_of(runs)
    return Row(
        optimizer=name,
        is_baseline=is_baseline,
        rank=rank,
        tied=False,
        best_lr=lr,
        lr_at_edge=edge(lr, [point.lr for point in curve.points]) if curve else "",
        val_loss=estimate(losses) if losses else None,
        difference=None if is_baseline else paired_difference(runs, reference.runs),
        tokens_to_baseline=tokens,
        token_speedup=speedup(reference.tokens, tokens),
        seconds_to_baseline=seconds,
        time_speedup=speedup(reference.seconds, seconds),
        step_ms=median(run.step_ms for run in measured) if measured else None,
        optimizer_ms=median(run.optimizer_ms for run in measured) if measured else None,
        state_bytes=median(run.state_bytes for run in measured) if measured else None,
        parameters=measured[0].parameters if measured else None,
        diverged=sum(not run.finished for run in runs),
        hashes=tuple(run.hash for run in runs),
    )
