"""Schedules of learning rate and weight decay, as multiples of their peaks.

A schedule is a curve over the run, from 0 to T = training.steps: a warmup up to W = warmup_steps,
then a shape from 1 down. Step s, counted from 0, has the value of the curve at t = s + first_step:
at its end, as torch's OneCycleLR has it (the last step reaches the floor), or at its start, as most
schedules written by hand have it (the last step is one short of the floor).
`published_schedules.toml` holds the settings that give schedules of papers and programs exactly.
"""

from __future__ import annotations

import importlib.resources
import math
import tomllib
from dataclasses import dataclass, fields
from typing import Any, Literal

from torch import Tensor
from torch.optim import Optimizer

from steepest.errors import UserError, unknown


@dataclass(frozen=True)
class ScheduleConfig:
    """How learning rate and weight decay change over the run, as multiples of their peaks."""

    name: Literal[
        "cosine",
        "linear",
        "wsd",
        "trapezoid",
        "cosine_constant",
        "inverse_sqrt",
        "constant",
        "none",
    ] = "cosine"
    """Shape after warmup: down a cosine or a line; wsd (warmup, stable, decay) holds the peak, then
    decays; trapezoid is wsd down a line; cosine_constant stays at the end of its cosine;
    inverse_sqrt is sqrt(warmup_steps / step). none has no warmup either, for schedule-free
    methods."""
    warmup_steps: int = 20
    """Steps of warmup."""
    warmup_shape: Literal["linear", "half_cosine"] = "linear"
    """Shape of the warmup; half_cosine is that of torch's OneCycleLR."""
    warmup_start_ratio: float | None = None
    """Multiple of the peak at the first step. If not given, it is 1/warmup_steps, and a linear
    warmup has (step + 1) / warmup_steps."""
    first_step: int = 1
    """Number of the first step, 1 or 0, on a curve from 0 to training.steps: with 1 the last step
    has the final ratio, with 0 it is one step short of it."""
    final_lr_ratio: float = 0.1
    """Multiple of the peak at the end (inverse_sqrt, constant and none have none)."""
    decay_fraction: float = 0.2
    """Part of all steps over which wsd and trapezoid decay: so many steps, rounded down."""
    decay_shape: Literal["linear", "sqrt", "square", "cosine", "mirror_cosine", "exponential"] = (
        "linear"
    )
    """Shape of the decay of wsd: with x from 0 to 1, the way down is x, sqrt(x), x^2, half a cosine
    or that mirrored at x; exponential is final_lr_ratio^x."""
    constant_steps: int = 0
    """Last steps that cosine_constant stays at the final ratio."""
    weight_decay: Literal["constant", "proportional", "independent"] = "constant"
    """Coefficient of decay of a step, which shrinks weights by lr times it: constant,
    proportional to the scheduled lr, or so that the product is independent of the schedule."""

    def __post_init__(self) -> None:
        _at_least_0("warmup_steps", self.warmup_steps)
        _at_least_0("constant_steps", self.constant_steps)
        _ratio("final_lr_ratio", self.final_lr_ratio)
        if self.warmup_start_ratio is not None:
            _ratio("warmup_start_ratio", self.warmup_start_ratio)
        if self.first_step not in (0, 1):
            raise UserError(f"schedule.first_step must be 0 or 1, not {self.first_step}.")
        if not 0 < self.decay_fraction <= 1:
            raise UserError(
                f"schedule.decay_fraction must be above 0 and at most 1, not {self.decay_fraction}."
            )
        self._check_used()
        if self.decay_shape == "exponential" and self.final_lr_ratio == 0:
            raise UserError(
                "schedule.decay_shape exponential is final_lr_ratio^x, which is 0 at once with "
                "schedule.final_lr_ratio 0; give it a ratio above 0."
            )

    def _check_used(self) -> None:
        """Raise UserError for a field that is set and that the schedule does not have."""
        defaults = {field.name: field.default for field in fields(self)}
        for key, names in _ONLY_OF.items():
            value = getattr(self, key)
            if value not in (0, defaults[key]) and self.name not in names:
                raise UserError(
                    f"schedule.{key} is {value}, but it is for {' and '.join(names)} alone, and "
                    f"schedule.name is {self.name}."
                )
        if self.name == "none" and self.warmup_steps not in (0, defaults["warmup_steps"]):
            raise UserError(
                f"schedule.warmup_steps is {self.warmup_steps}, but schedule.name none has no "
                "warmup; constant has, and a schedule-free optimizer has one of its own."
            )

    def check(self, steps: int) -> None:
        """Raise UserError if the schedule does not fit into `steps` steps."""
        if self.name != "none" and self.warmup_steps + self.constant_steps >= steps:
            which = "schedule.warmup_steps" + " + constant_steps" * (self.constant_steps > 0)
            raise UserError(
                f"{which} is {self.warmup_steps + self.constant_steps}; it must be less than "
                f"training.steps, which is {steps}."
            )
        if (
            self.name in _ONLY_OF["decay_fraction"]
            and self.warmup_steps + self.decay(steps) > steps
        ):
            raise UserError(
                f"schedule.warmup_steps is {self.warmup_steps} and schedule.decay_fraction "
                f"{self.decay_fraction}, {self.decay(steps)} steps; together they must be at most "
                f"training.steps, which is {steps}."
            )
        if self.weight_decay == "independent":
            for step in (0, steps - 1):
                if multiplier(step, steps, self) == 0:
                    raise UserError(
                        "schedule.weight_decay independent divides by the learning rate, which is "
                        f"0 at step {step + 1}; give schedule."
                        + ("final_lr_ratio" if step else "warmup_start_ratio")
                        + " a value above 0."
                    )

    def decay(self, steps: int) -> int:
        """Return over how many of `steps` steps wsd and trapezoid decay."""
        return max(1, int(self.decay_fraction * steps))


_FALLING = ("cosine", "linear", "wsd", "trapezoid", "cosine_constant")
_WARMED = (*_FALLING, "inverse_sqrt", "constant")
_ONLY_OF = {
    "warmup_shape": _WARMED,
    "warmup_start_ratio": _WARMED,
    "final_lr_ratio": _FALLING,
    "decay_fraction": ("wsd", "trapezoid"),
    "decay_shape": ("wsd",),
    "constant_steps": ("cosine_constant",),
}
"""Fields that not every schedule has."""


def published(name: str, **values: Any) -> ScheduleConfig:
    """Return a schedule of `published_schedules.toml`, with its lengths and other values given.

    Raises UserError for an unknown name.
    """
    text = importlib.resources.files("steepest.train").joinpath("published_schedules.toml")
    known = tomllib.loads(text.read_text("utf-8"))
    if name not in known:
        raise unknown("schedule", name, known)
    return ScheduleConfig(**{**known[name]["fields"], **values})


def multiplier(step: float, steps: int, schedule: ScheduleConfig, length: float = 1.0) -> float:
    """Return the factor on the peak learning rate of a step that begins at `step`, from 0.

    `length` is how far the step goes. Steps of batches of one size begin at 0, 1, ..., `steps - 1`
    and go as far as 1; of changing size, both are rows over `data.batch_size`.
    """
    if schedule.name == "none":
        return 1.0
    climbed = _warmup(step, length, schedule)
    at = step + length * schedule.first_step
    start, end = max(schedule.warmup_steps, schedule.first_step), steps
    if schedule.name in ("wsd", "trapezoid"):
        start = max(start, steps - schedule.decay(steps))
    if schedule.name == "cosine_constant":
        end -= schedule.constant_steps
    if climbed < 1 or schedule.name == "constant" or at <= start:
        return climbed
    if schedule.name == "inverse_sqrt":
        return math.sqrt(max(start, 1) / max(at, 1))
    x = min((at - start) / (end - start), 1.0) if end > start else 1.0
    return _decayed(x, schedule)


def _warmup(step: float, length: float, schedule: ScheduleConfig) -> float:
    """Return the factor that the warmup has reached; 1 when it is over."""
    steps, start = schedule.warmup_steps, schedule.warmup_start_ratio
    if start is None and schedule.warmup_shape == "linear":
        return min((step + length) / steps, 1.0) if steps else 1.0
    first = 1 if start is None else schedule.first_step  # where on the curve step 0 is
    x = (step + first * (length - 1)) / (steps - first) if steps > first else 1.0
    if x >= 1:
        return 1.0
    x = max(x, 0.0)  # before it, as a part of a batch is
    if schedule.warmup_shape == "half_cosine":
        x = _half_cosine(x)
    start = 1 / steps if start is None else start
    return start + (1 - start) * x


def _decayed(x: float, schedule: ScheduleConfig) -> float:
    """Return the factor after the part `x` of the decay."""
    shapes = {"cosine": "cosine", "cosine_constant": "cosine", "wsd": schedule.decay_shape}
    shape = shapes.get(schedule.name, "linear")
    if shape == "exponential":
        return math.pow(schedule.final_lr_ratio, x)
    if shape == "sqrt":
        x = math.sqrt(x)
    elif shape == "square":
        x *= x
    elif shape == "cosine":
        x = _half_cosine(x)
    elif shape == "mirror_cosine":
        x = 2 * x - _half_cosine(x)
    return (1 - x) + x * schedule.final_lr_ratio


def _half_cosine(x: float) -> float:
    return 0.5 * (1 - math.cos(math.pi * x))


def decay_multiplier(factor: float, schedule: ScheduleConfig) -> float:
    """Return the factor on the coefficient of weight decay where the learning rate's is `factor`.

    With peaks lr and wd, a step of decoupled decay shrinks weights by lr factor times the
    coefficient:

    * constant: lr factor wd. AdamW's (Loshchilov and Hutter, 2019, arXiv:1711.05101, whose formula
      leaves lr out of the product: their wd is lr wd here).
    * proportional: lr factor^2 wd. AdamC's, which keeps the ratio of gradient to weight where there
      are normalization layers (Defazio, 2025, arXiv:2506.02285); there of such layers alone.
    * independent: lr wd at every step, whatever the schedule.
    """
    if schedule.weight_decay == "constant":
        return 1.0
    return factor if schedule.weight_decay == "proportional" else 1 / factor


class Schedules:
    """Sets learning rate and weight decay of an optimizer's parameter groups.

    Their values when this is made are the peaks: every group has its own. Both are functions of the
    place in the run alone, so there is nothing to save.
    """

    def __init__(self, optimizer: Optimizer, schedule: ScheduleConfig, steps: int) -> None:
        self.optimizer, self.schedule, self.steps = optimizer, schedule, steps
        groups = optimizer.param_groups
        self.peaks = [float(group["lr"]) for group in groups]
        self.decays = [group.get("weight_decay") for group in groups]
        for group, peak in zip(groups, self.peaks, strict=True):
            group.setdefault("initial_lr", peak)  # where torch's own schedulers put it

    def set(self, step: float, length: float = 1.0) -> None:
        """Set the values of the step that begins at `step`; see `multiplier`."""
        factor = multiplier(step, self.steps, self.schedule, length)
        coefficient = decay_multiplier(factor, self.schedule)
        groups = self.optimizer.param_groups
        for group, peak, decay in zip(groups, self.peaks, self.decays, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(peak * factor)
            else:
                group["lr"] = peak * factor
            if decay is not None and self.schedule.weight_decay != "constant":
                group["weight_decay"] = decay * coefficient


def _at_least_0(name: str, value: int) -> None:
    if value < 0:
        raise UserError(f"schedule.{name} must be at least 0, not {value}.")


def _ratio(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise UserError(f"schedule.{name} must be between 0 and 1, not {value}.")
