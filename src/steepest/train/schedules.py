"""Learning-rate schedules as multiples of the peak."""

from __future__ import annotations

import math

from steepest.train.config import ScheduleConfig


def multiplier(step: int, steps: int, schedule: ScheduleConfig) -> float:
    """Return the factor on the peak learning rate at `step`, counted from 0 to `steps - 1`.

    Warmup is linear, (step + 1) / warmup_steps, and reaches 1 at its last step; `final_lr_ratio` is
    reached at the last step of the run. A run without a step between the two ends at the peak.
    """
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    last = steps - 1
    peak = max(schedule.warmup_steps - 1, 0)  # the step at which the multiplier is 1
    if schedule.name == "constant" or last == peak:
        return 1.0
    if schedule.name == "wsd":
        decay_steps = max(1, round(schedule.decay_fraction * steps))
        peak = max(peak, last - decay_steps)
    progress = min(max(step - peak, 0) / (last - peak), 1.0)
    if schedule.name == "cosine":
        progress = 0.5 * (1 - math.cos(math.pi * progress))
    return (1 - progress) + progress * schedule.final_lr_ratio
