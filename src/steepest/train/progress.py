"""How far a run is, for somebody who watches it."""

from __future__ import annotations

from dataclasses import dataclass

from steepest.train.run_state import RunState
from steepest.train.timing import StepClock

PROGRESS_SECONDS = 0.25
"""Least time between two calls of `on_progress`."""


@dataclass(frozen=True)
class Progress:
    """How far a run is, and how fast."""

    step: int
    steps: int
    tokens: int
    loss: float | None
    """The last training loss; None before the first step."""
    tokens_per_second: float
    """0 until a step other than the first of the process has been timed."""
    phase: str
    """preparing, training, evaluating or done."""
    mfu: float | None = None
    """Model FLOPs utilisation, the share of the device's bfloat16 peak; None if that is unknown."""
    seconds_left: float | None = None
    """Of steps and evaluations to come, by those so far; None while there is no speed."""


class Pace:
    """Wall time of a step of this process, with all that is around it but evaluations.

    The first step is left out: it compiles kernels and fills caches.
    """

    def __init__(self, clock: StepClock) -> None:
        self.clock = clock
        self.begin: tuple[int, float] | None = None

    def _moment(self) -> float:
        return self.clock.elapsed_seconds - self.clock.evaluation_seconds

    def after(self, step: int) -> None:
        """Count from here, if this is the end of the first step of the process."""
        if self.begin is None:
            self.begin = (step, self._moment())

    def step_seconds(self, step: int) -> float:
        """Return the mean over the steps up to this one; 0 before the second."""
        if self.begin is None or step == self.begin[0]:
            return 0.0
        return (self._moment() - self.begin[1]) / (step - self.begin[0])


def progress_of(state: RunState, phase: str, pace: Pace) -> Progress:
    """Return how far a run is."""
    steps = state.learner.batch.expected_steps
    every, timed = state.config.evaluation.every, state.clock.timed
    seconds = max(state.clock.step_seconds, pace.step_seconds(state.step))
    return Progress(
        step=state.step,
        steps=steps,
        tokens=state.tokens,
        loss=state.loss,
        tokens_per_second=state.tokens_per_second if timed else 0.0,
        phase=phase,
        mfu=state.mfu if timed else None,
        seconds_left=seconds_left(state.clock, seconds, state.step, steps, every)
        if timed
        else None,
    )


def seconds_left(
    clock: StepClock, step_seconds: float, step: int, steps: int, evaluate_every: int
) -> float:
    """Return what the rest of a run will take at `step_seconds` and with evaluations as so far.

    Evaluations at further steps than every `evaluate_every` are not foreseen.
    """
    evaluation = clock.evaluation_seconds / (1 + step // evaluate_every)
    evaluations = steps // evaluate_every - step // evaluate_every
    if steps % evaluate_every and step < steps:
        evaluations += 1  # the last
    return (steps - step) * step_seconds + evaluations * evaluation
