"""How long training steps take, measured without making a GPU wait."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median

import torch

Mark = float | torch.cuda.Event
"""A moment: the clock's seconds on a CPU, an event in the stream on a GPU."""

WINDOW = 10_000
"""Steps that the medians look back on."""


PARTS = ("data", "model", "optimizer")
"""What a step does: waits for its batch, goes forward and backward, steps the optimizer."""


class StepClock:
    """Durations of whole steps and of their parts, in seconds.

    `seconds` sums whole steps, over this process and the ones it resumed, and `totals` their parts;
    `elapsed_seconds` is all of the time that those processes took.
    The first step of a process compiles kernels and fills caches: it is no part of the medians, and
    counts at most as long as the second, once there is one.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._began, self._before = time.perf_counter(), 0.0
        self._first: tuple[float, ...] | None = None
        self._fresh = True  # until the second step of this process
        self._sums = [0.0] * (1 + len(PARTS))
        self.evaluation_seconds = 0.0
        self.saving_seconds = 0.0
        self._steps: deque[tuple[float, ...]] = deque(maxlen=WINDOW)

    def mark(self) -> Mark:
        """Return this moment; on a GPU, the moment at which its work so far will be done."""
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def add(self, marks: tuple[Mark, Mark, Mark, Mark, Mark]) -> None:
        """Count one step, given when it began, had its batch, began and ended the optimizer's part,
        and ended. On a GPU this waits for the step to be over.
        """
        start, loaded, begin, finish, end = marks
        step = (
            _between(start, end),
            _between(start, loaded),
            _between(loaded, begin),
            _between(begin, finish),
        )
        if self._first is None:
            self._first = step
            return
        for index, duration in enumerate(step):
            first = min(self._first[index], duration) if self._fresh else 0.0
            self._sums[index] += first + duration
        self._fresh = False
        self._steps.append(step)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Count the time that the context lasts, in which no step runs, as evaluation."""
        start = time.perf_counter()
        yield
        self.evaluation_seconds += time.perf_counter() - start

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Count the time that the context lasts, in which no step runs, as that of checkpoints."""
        start = time.perf_counter()
        yield
        self.saving_seconds += time.perf_counter() - start

    @property
    def timed(self) -> bool:
        """Whether a step of this process other than its first has been timed."""
        return not self._fresh

    @property
    def elapsed_seconds(self) -> float:
        """Wall time since the run began, less what processes took after their last checkpoints."""
        return self._before + time.perf_counter() - self._began

    @property
    def seconds(self) -> float:
        """Sum of the durations of steps."""
        return self._sums[0]

    def totals(self) -> dict[str, float]:
        """Return the seconds that each of `PARTS`, evaluations and checkpoints took in all."""
        parts = dict(zip(PARTS, self._sums[1:], strict=True))
        beside = {"evaluation": self.evaluation_seconds, "checkpoint": self.saving_seconds}
        return {**parts, **beside}

    @property
    def step_seconds(self) -> float:
        """Median duration of a step; 0 before the first."""
        return self._median(0)

    def part_seconds(self) -> dict[str, float]:
        """Return the median duration of each of `PARTS`; 0 before the first step."""
        return {name: self._median(1 + index) for index, name in enumerate(PARTS)}

    def _median(self, index: int) -> float:
        steps = self._steps or [self._first or (0.0,) * (1 + len(PARTS))]
        return median(step[index] for step in steps)

    def state_dict(self) -> dict[str, object]:
        """Return what a checkpoint needs."""
        return {
            "sums": list(self._sums),
            "elapsed_seconds": self.elapsed_seconds,
            "evaluation_seconds": self.evaluation_seconds,
            "saving_seconds": self.saving_seconds,
            "steps": torch.tensor(list(self._steps), dtype=torch.float64),
        }

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Continue from `state_dict`."""
        sums, evaluation, steps = state["sums"], state["evaluation_seconds"], state["steps"]
        saving, elapsed = state["saving_seconds"], state["elapsed_seconds"]
        assert isinstance(sums, list)
        assert isinstance(elapsed, float)
        assert isinstance(evaluation, float)
        assert isinstance(saving, float)
        assert isinstance(steps, torch.Tensor)
        self._sums, self.evaluation_seconds, self.saving_seconds = sums, evaluation, saving
        self._before = elapsed
        self._steps = deque(map(tuple, steps.tolist()), maxlen=WINDOW)


def _between(start: Mark, end: Mark) -> float:
    if isinstance(start, float) or isinstance(end, float):
        assert isinstance(start, float)
        assert isinstance(end, float)
        return end - start
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000
