"""How long training steps take, measured without making a GPU wait."""

from __future__ import annotations

import time
from collections import deque
from statistics import median

import torch

Mark = float | torch.cuda.Event
"""A moment: the clock's seconds on a CPU, an event in the stream on a GPU."""

WINDOW = 10_000
"""Steps that the medians look back on."""


class StepClock:
    """Durations of whole steps and of the optimizer's part of them, in seconds.

    `seconds` sums whole steps, over this process and the ones it resumed. The first step of a
    process compiles kernels and fills caches: it is no part of the medians, and counts at most as
    long as the second, once there is one.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._first: tuple[float, float] | None = None
        self._fresh = True  # until the second step of this process
        self.seconds = 0.0
        self._steps: deque[float] = deque(maxlen=WINDOW)
        self._optimizer: deque[float] = deque(maxlen=WINDOW)

    def mark(self) -> Mark:
        """Return this moment; on a GPU, the moment at which its work so far will be done."""
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def add(self, start: Mark, optimizer_start: Mark, optimizer_end: Mark, end: Mark) -> None:
        """Count one step, given by its marks. On a GPU this waits for the step to be over."""
        step, optimizer = _between(start, end), _between(optimizer_start, optimizer_end)
        if self._first is None:
            self._first = (step, optimizer)
            return
        if self._fresh:
            self.seconds += min(self._first[0], step)
            self._fresh = False
        self.seconds += step
        self._steps.append(step)
        self._optimizer.append(optimizer)

    @property
    def step_seconds(self) -> float:
        """Median duration of a step; 0 before the first."""
        first = self._first or (0.0, 0.0)
        return median(self._steps or [first[0]])

    @property
    def optimizer_seconds(self) -> float:
        """Median duration of the optimizer's part of a step; 0 before the first."""
        first = self._first or (0.0, 0.0)
        return median(self._optimizer or [first[1]])

    def state_dict(self) -> dict[str, object]:
        """Return what a checkpoint needs."""
        return {
            "seconds": self.seconds,
            "steps": torch.tensor(list(self._steps), dtype=torch.float64),
            "optimizer": torch.tensor(list(self._optimizer), dtype=torch.float64),
        }

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Continue from `state_dict`."""
        seconds, steps, optimizer = state["seconds"], state["steps"], state["optimizer"]
        assert isinstance(seconds, float)
        assert isinstance(steps, torch.Tensor)
        assert isinstance(optimizer, torch.Tensor)
        self.seconds = seconds
        self._steps = deque(steps.tolist(), maxlen=WINDOW)
        self._optimizer = deque(optimizer.tolist(), maxlen=WINDOW)


def _between(start: Mark, end: Mark) -> float:
    if isinstance(start, float) or isinstance(end, float):
        assert isinstance(start, float)
        assert isinstance(end, float)
        return end - start
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000
