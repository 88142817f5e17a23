"""Schedules against closed forms, and on an optimizer."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from steepest.errors import UserError
from steepest.train import RunConfig, ScheduleConfig, TrainingConfig, multiplier
from steepest.train.schedules import Schedules

STEPS, WARMUP, FINAL = 101, 11, 0.1


def curve(name: str, steps: int = STEPS, **changes: Any) -> list[float]:
    options = {"warmup_steps": WARMUP, "final_lr_ratio": FINAL, **changes}
    schedule = ScheduleConfig(name=name, **options)  # type: ignore[arg-type]
    return [multiplier(step, steps, schedule) for step in range(steps)]


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd", "inverse_sqrt", "constant"])
def test_warmup_is_linear_from_above_zero_to_the_peak(name: str) -> None:
    assert curve(name)[:WARMUP] == [(i + 1) / WARMUP for i in range(WARMUP)]
    assert max(curve(name)) == 1.0
    assert curve(name, warmup_steps=0)[0] == 1.0


@pytest.mark.parametrize(
    ("first_step", "start", "top"),
    [(1, None, WARMUP - 1), (0, None, WARMUP - 1), (1, 0.2, WARMUP - 1), (0, 0.2, WARMUP)],
)
@pytest.mark.parametrize("shape", ["linear", "half_cosine"])
def test_warmup_goes_from_its_start_to_the_peak(
    first_step: int, start: float | None, top: int, shape: str
) -> None:
    values = curve("constant", first_step=first_step, warmup_start_ratio=start, warmup_shape=shape)
    low = 1 / WARMUP if start is None else start
    for step, value in enumerate(values[:top]):
        x = step / top if shape == "linear" else (1 - math.cos(math.pi * step / top)) / 2
        assert value == pytest.approx(low + (1 - low) * x, abs=1e-15)
    assert set(values[top:]) == {1.0}


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd", "trapezoid", "cosine_constant"])
@pytest.mark.parametrize("final", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("warmup", [0, 1, 11, 100])
def test_the_last_step_has_the_final_ratio(name: str, final: float, warmup: int) -> None:
    values = curve(name, final_lr_ratio=final, warmup_steps=warmup)
    assert values[-1] == final
    assert all(0 <= value <= 1 for value in values)
    after = values[max(warmup - 1, 0) :]
    assert after == sorted(after, reverse=True)


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd", "cosine_constant"])
def test_counted_from_zero_a_schedule_is_one_step_behind(name: str) -> None:
    from_one = curve(name, warmup_steps=0)
    from_zero = curve(name, warmup_steps=0, first_step=0)
    if name == "wsd":
        assert from_zero[1:] == from_one[:-1]
    assert from_zero[0] == from_one[0] == 1.0
    assert FINAL < from_zero[-1] < from_zero[-2]
    assert multiplier(STEPS, STEPS, ScheduleConfig(name, 0, first_step=0)) == FINAL  # type: ignore[arg-type]


def test_shapes_against_closed_forms() -> None:
    peak, span = WARMUP - 1, STEPS - WARMUP  # the decay begins after the last step of warmup
    for step in range(peak, STEPS):
        t = (step - peak) / span
        cosine = FINAL + (1 - FINAL) * (1 + math.cos(math.pi * t)) / 2
        assert curve("cosine")[step] == pytest.approx(cosine, abs=1e-12)
        assert curve("linear")[step] == pytest.approx(1 - (1 - FINAL) * t, abs=1e-12)
        assert curve("inverse_sqrt")[step] == pytest.approx((WARMUP / (step + 1)) ** 0.5)
        assert curve("constant")[step] == 1.0
    assert set(curve("none", warmup_steps=0)) == {1.0}
    assert curve("inverse_sqrt", warmup_steps=0)[3] == 0.5


SHAPES = {
    "linear": lambda x: 1 - x,
    "sqrt": lambda x: 1 - x**0.5,
    "square": lambda x: 1 - x**2,
    "cosine": lambda x: math.cos(math.pi * x / 2) ** 2,
    "mirror_cosine": lambda x: 2 * (1 - x) - math.cos(math.pi * x / 2) ** 2,
    "exponential": lambda x: (FINAL**x - FINAL) / (1 - FINAL),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("first_step", [0, 1])
def test_wsd_holds_then_decays_over_its_fraction(shape: str, first_step: int) -> None:
    values = curve("wsd", decay_fraction=0.2, decay_shape=shape, first_step=first_step)
    decay = 20  # 0.2 * 101, rounded down
    held, decayed = values[WARMUP - 1 : STEPS - decay], values[STEPS - decay :]
    assert set(held) == {1.0}
    expected = [SHAPES[shape]((i + first_step) / decay) for i in range(decay)]
    assert decayed == pytest.approx([FINAL + (1 - FINAL) * down for down in expected], abs=1e-12)
    if shape == "linear":
        trapezoid = curve("trapezoid", decay_fraction=0.2, first_step=first_step)
        assert values == trapezoid
    assert curve("wsd", decay_fraction=1.0) == pytest.approx(curve("linear"))


def test_a_cosine_stays_where_it_ends() -> None:
    values = curve("cosine_constant", constant_steps=20)
    assert values[:-20] == curve("cosine", STEPS - 20)
    assert values[-20:] == [FINAL] * 20


def test_one_step_runs_at_the_peak() -> None:
    assert multiplier(0, 1, ScheduleConfig(warmup_steps=0)) == 1.0


@pytest.mark.parametrize("first_step", [0, 1])
@pytest.mark.parametrize("name", ["cosine", "wsd", "inverse_sqrt"])
def test_a_step_of_several_batches_is_at_its_start_or_end(name: str, first_step: int) -> None:
    schedule = ScheduleConfig(name, WARMUP, first_step=first_step)  # type: ignore[arg-type]
    for step in range(0, STEPS - 4, 4):
        whole = multiplier(step, STEPS, schedule, length=4.0)
        same = step if step >= WARMUP and first_step == 0 else step + 3
        assert whole == multiplier(same, STEPS, schedule)
    assert multiplier(0.0, STEPS, schedule, length=0.25) == 0.25 / WARMUP


@pytest.mark.parametrize("first_step", [0, 1])
@pytest.mark.parametrize("start", [None, 0.01])
@pytest.mark.parametrize("shape", ["linear", "half_cosine"])
def test_so_is_a_step_of_a_warmup_with_a_start(
    shape: str, start: float | None, first_step: int
) -> None:
    schedule = ScheduleConfig(
        warmup_steps=WARMUP,
        warmup_shape=shape,  # type: ignore[arg-type]
        warmup_start_ratio=start,
        first_step=first_step,
    )
    behind = 3 if start is None or first_step else 0
    for step in range(0, WARMUP - 3):
        whole = multiplier(step, STEPS, schedule, length=4.0)
        assert whole == pytest.approx(multiplier(step + behind, STEPS, schedule), abs=1e-15)
    if behind:  # it ends where the warmup does
        assert multiplier(WARMUP - 4, STEPS, schedule, length=4.0) == 1.0
    low = 1 / WARMUP if start is None else start
    if (shape, start) != ("linear", None):
        assert multiplier(0.0, STEPS, schedule, length=0.25) == low


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"decay_shape": "sqrt"}, "schedule.decay_shape is sqrt, but it is for wsd alone"),
        ({"constant_steps": 3}, "for cosine_constant alone, and schedule.name is cosine"),
        ({"name": "linear", "decay_fraction": 0.3}, "it is for wsd and trapezoid alone"),
        ({"name": "none", "warmup_steps": 5}, "schedule.name none has no warmup"),
        ({"first_step": 2}, "schedule.first_step must be 0 or 1, not 2"),
        ({"warmup_start_ratio": 1.5}, "schedule.warmup_start_ratio must be between 0 and 1"),
        ({"decay_fraction": 0.0}, "schedule.decay_fraction must be above 0"),
        ({"name": "constant", "final_lr_ratio": 0.2}, "schedule.final_lr_ratio is 0.2, but it is"),
        ({"name": "none", "warmup_shape": "half_cosine"}, "schedule.name is none"),
        (
            {"name": "wsd", "decay_shape": "exponential", "final_lr_ratio": 0.0},
            "which is 0 at once with schedule.final_lr_ratio 0",
        ),
    ],
)
def test_what_a_schedule_has_not_is_said(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        ScheduleConfig(**values)


def test_a_schedule_must_fit_its_run() -> None:
    training = TrainingConfig(steps=30)
    RunConfig(schedule=ScheduleConfig("none"), training=TrainingConfig(steps=5))
    with pytest.raises(UserError, match=r"warmup_steps is 30; it must be less than training.steps"):
        RunConfig(schedule=ScheduleConfig(warmup_steps=30), training=training)
    schedule = ScheduleConfig("cosine_constant", constant_steps=10)
    with pytest.raises(UserError, match=r"warmup_steps \+ constant_steps is 30"):
        RunConfig(schedule=schedule, training=training)
    for name in ("wsd", "trapezoid"):
        RunConfig(schedule=ScheduleConfig(name, 20, decay_fraction=1 / 3), training=training)
        with pytest.raises(UserError, match=r"is 20 and .* 0.4, 12 steps; together .* is 30"):
            RunConfig(schedule=ScheduleConfig(name, 20, decay_fraction=0.4), training=training)


@pytest.mark.parametrize("tensor", [False, True])
def test_all_groups_follow_the_schedule(tensor: bool) -> None:
    weights = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    lrs = [torch.tensor(v, dtype=torch.float64) if tensor else v for v in (0.5, 0.03)]
    groups = [{"params": [w], "lr": lr} for w, lr in zip(weights, lrs, strict=True)]
    optimizer = torch.optim.AdamW(groups)
    schedule = ScheduleConfig(warmup_steps=4)
    schedules = Schedules(optimizer, schedule, 30)
    for step in range(30):
        schedules.set(step)
        factor = multiplier(step, 30, schedule)
        assert [float(g["lr"]) for g in optimizer.param_groups] == [0.5 * factor, 0.03 * factor]
