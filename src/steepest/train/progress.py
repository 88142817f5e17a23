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
    phase: str
    """preparing, training, evaluating or done."""
    mfu: float | None = None
    """Model FLOPs utilisation, the share of the device's bfloat16 peak; None if that is unknown."""
    seconds_left: float | None = None
    """Of steps and evaluations to come, by those so far; None before the first step."""


def progress_of(state: RunState, phase: str) -> Progress:
    """Return how far a run is."""
    steps = state.learner.batch.expected_steps
    every = state.config.evaluation.every
    return Progress(
        step=state.step,
        steps=steps,
        tokens=state.tokens,
        loss=state.loss,
        tokens_per_second=state.tokens_per_second,
        phase=phase,
        mfu=state.mfu,
        seconds_left=seconds_left(state.clock, state.step, steps, every),
    )


def seconds_left(clock: StepClock, step: int, steps: int, evaluate_every: int) -> float | None:
    """Return what the rest of a run will take at the pace so far, None before the first step.

    Evaluations at further steps than every `evaluate_every` are not foreseen.
    """
    if not clock.step_seconds:
        return None
    evaluation = clock.evaluation_seconds / (1 + step // evaluate_every)
    evaluations = steps // evaluate_every - step // evaluate_every
    if steps % evaluate_every and step < steps:
        evaluations += 1  # the last
    return (steps - step) * clock.step_seconds + evaluations * evaluation
