"""What every form of the report says: the rows, the answer, the warnings and the limits."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from steepest.analysis import LrCurve, Row, Run, leaderboard, lr_curves
from steepest.analysis.runs import by_optimizer
from steepest.study.store import Race


@dataclass(frozen=True)
class Findings:
    """A race and what follows from it."""

    race: Race

    @cached_property
    def rows(self) -> list[Row]:
        """The leaderboard."""
        return leaderboard(self.race.final_runs, self.race.tuning_runs, self.race.baseline)

    @cached_property
    def curves(self) -> dict[str, LrCurve]:
        """The learning-rate curves."""
        return lr_curves(self.race.tuning_runs)

    @cached_property
    def finals(self) -> dict[str, list[Run]]:
        """The complete final runs of each optimizer."""
        return by_optimizer(self.race.final_runs)

    @cached_property
    def names(self) -> list[str]:
        """All optimizers, in the race's order; this gives each its color."""
        race = self.race
        named = [*race.optimizers, *race.tuning, *race.final, race.baseline]
        return list(dict.fromkeys(named))

    @cached_property
    def ranked(self) -> list[Row]:
        """The rows with a final loss."""
        return [row for row in self.rows if row.val_loss is not None]

    @cached_property
    def leaders(self) -> list[Row]:
        """The rows that share the first rank."""
        return [row for row in self.ranked if row.rank == 1]

    @cached_property
    def seeds(self) -> list[int]:
        """The seeds of the final runs."""
        return sorted({run.seed for run in self.race.final_runs})

    def row(self, optimizer: str) -> Row | None:
        """Return the row of an optimizer, if it has one."""
        return next((row for row in self.rows if row.optimizer == optimizer), None)
