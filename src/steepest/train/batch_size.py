"""How many rows the steps of a run have, and how many it has seen.

A run ends when it has seen training.steps * data.batch_size rows, in as many steps as that takes,
so that runs with different batch sizes see the same tokens. What is given in steps of the schedule
is in steps of data.batch_size rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Literal

from steepest.errors import UserError


@dataclass(frozen=True)
class BatchConfig:
    """How many rows a step has, over the run."""

    schedule: Literal["fixed", "ramp", "norm_test"] = "fixed"
    """data.batch_size at every step; or up to it from start_rows, as for GPT-3; or as large as the
    norm test asks for, from data.batch_size on."""
    start_rows: int | None = None
    """Rows of the first step of a ramp."""
    increment_rows: int | None = None
    """Rows by which a ramp grows at a time."""
    ramp_rows: int | None = None
    """Rows that the run has seen when a ramp reaches data.batch_size."""
    eta: float | None = None
    """The norm test holds the standard deviation of the gradient at most eta times its norm."""
    max_rows: int | None = None
    """Rows of the largest batch of the norm test; its batches are multiples of data.batch_size."""

    def __post_init__(self) -> None:
        needed = {"fixed": (), "ramp": _RAMP, "norm_test": _NORM_TEST}[self.schedule]
        for name in (field.name for field in fields(self) if field.name != "schedule"):
            value = getattr(self, name)
            if (value is None) == (name in needed):
                verb = "needs" if value is None else "has no"
                raise UserError(f"batch.schedule {self.schedule} {verb} batch.{name}.")
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"batch.{name} must be a positive number, not {value}.")

    def check(self, batch_size: int, parts: int, steps: int) -> None:
        """Raise UserError if it does not fit a run of `steps` batches in `parts` parts each."""
        if self.schedule == "ramp":
            self._check_ramp(batch_size, batch_size // parts, batch_size * steps)
        if self.max_rows is not None and self.max_rows % batch_size:
            raise UserError(
                f"batch.max_rows is {self.max_rows}; it must be a multiple of data.batch_size, "
                f"which is {batch_size}."
            )
        if self.schedule == "norm_test" and parts < 2:
            raise UserError(
                "batch.schedule norm_test compares the gradients of parts of a batch; "
                "training.gradient_accumulation must be at least 2."
            )

    def _check_ramp(self, batch_size: int, part: int, rows: int) -> None:
        start, increment, over = self._ramp()
        for name, value in (("start_rows", start), ("increment_rows", increment)):
            if value % part:
                raise UserError(
                    f"batch.{name} is {value}; it must be a multiple of {part}, the rows of a "
                    "part: data.batch_size over training.gradient_accumulation."
                )
        if start >= batch_size or (batch_size - start) % increment:
            raise UserError(
                f"batch.start_rows is {start} and batch.increment_rows {increment}; some "
                f"increments must lead from the one to data.batch_size, which is {batch_size}."
            )
        if over > rows:
            raise UserError(
                f"batch.ramp_rows is {over}, more than the run's {rows}, which is training.steps "
                "times data.batch_size."
            )

    def _ramp(self) -> tuple[int, int, int]:
        return self.start_rows or 0, self.increment_rows or 0, self.ramp_rows or 0

    def planned(self, rows: int, batch_size: int) -> int:
        """Return the rows of a step of a ramp, before which the run has seen `rows`.

        With n increments to go, each comes ramp_rows / n after the one before, as in Megatron-LM's
        --rampup-batch-size.
        """
        start, increment, over = self._ramp()
        increments = (batch_size - start) // increment
        return start + increment * min(increments * rows // over, increments)

    def unit(self, batch_size: int) -> int:
        """Return the rows that all batches are multiples of."""
        if self.schedule == "ramp":
            return math.gcd(*self._ramp()[:2])
        return batch_size


_RAMP = ("start_rows", "increment_rows", "ramp_rows")
_NORM_TEST = ("eta", "max_rows")


class BatchSize:
    """Where a run is in its rows, and how many its coming step has.

    Raises UserError if `processes` can't share every batch equally.
    """

    def __init__(
        self, config: BatchConfig, *, batch_size: int, steps: int, processes: int = 1
    ) -> None:
        if (unit := config.unit(batch_size)) % processes:
            raise UserError(
                f"Batches that are multiples of {unit} rows can't be shared equally by {processes} "
                "processes."
            )
        self.config, self.batch_size = config, batch_size
        self.budget = batch_size * steps
        """Rows of the whole run."""
        self.steps = 0
        """Steps taken."""
        self.rows = 0
        """Rows seen in them."""
        self._tested = batch_size

    @property
    def size(self) -> int:
        """Rows of the coming step; 0 after the last one, which has what is left."""
        return min(self._planned(), self.budget - self.rows)

    @property
    def finished(self) -> bool:
        """Whether the run has seen all of its rows."""
        return self.rows >= self.budget

    @property
    def place(self) -> tuple[float, float]:
        """Where the coming step begins and how long it is, in steps of `batch_size` rows."""
        return self.rows / self.batch_size, self.size / self.batch_size

    @property
    def expected_steps(self) -> int:
        """Steps of the whole run, if the batch stays as large as it is."""
        return self.steps - (self.rows - self.budget) // self._planned()

    def advance(self, wanted: float = 0.0) -> None:
        """Count the coming step as taken, whose norm test asks for `wanted` rows."""
        self.rows, self.steps = self.rows + self.size, self.steps + 1
        if self.config.max_rows is not None and wanted > self._tested:
            batches = math.ceil(wanted / self.batch_size)
            self._tested = min(batches * self.batch_size, self.config.max_rows)

    def _planned(self) -> int:
        if self.config.schedule == "ramp":
            return self.config.planned(self.rows, self.batch_size)
        return self._tested

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs."""
        return {"steps": self.steps, "rows": self.rows, "tested": self._tested}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        self.steps, self.rows, self._tested = state["steps"], state["rows"], state["tested"]


def steps_taken(config: BatchConfig, *, batch_size: int, steps: int) -> int:
    """Return the steps of a run of `steps` batches of `batch_size` rows, of which a ramp has more.

    How many the norm test makes of them is not known before, so its are `steps`, the most.
    """
    if config.schedule != "ramp":
        return steps
    batch = BatchSize(config, batch_size=batch_size, steps=steps)
    while not batch.finished:
        batch.advance()
    return batch.steps
