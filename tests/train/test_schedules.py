"""Schedules against closed forms, and on an optimizer."""

from __future__ import annotations

import math

import pytest

from steepest.train import ScheduleConfig, multiplier

STEPS, WARMUP, FINAL = 101, 11, 0.1


def values(name: str, **changes: float) -> list[float]:
    options = {"warmup_steps": WARMUP, "final_lr_ratio": FINAL, **changes}
    schedule = ScheduleConfig(name=name, **options)  # type: ignore[arg-type]
    return [multiplier(step, STEPS, schedule) for step in range(STEPS)]


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd", "constant"])
def test_warmup_is_linear_from_above_zero_to_the_peak(name: str) -> None:
    assert values(name)[:WARMUP] == [pytest.approx((i + 1) / WARMUP) for i in range(WARMUP)]
    assert max(values(name)) == 1.0
    assert values(name, warmup_steps=0)[0] == 1.0


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd"])
@pytest.mark.parametrize("final", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("warmup", [0, 1, 11, 100])
def test_the_last_step_has_the_final_ratio(name: str, final: float, warmup: int) -> None:
    curve = values(name, final_lr_ratio=final, warmup_steps=warmup)
    assert curve[-1] == final
    assert all(0 <= value <= 1 for value in curve)
    after = curve[max(warmup - 1, 0) :]
    assert after == sorted(after, reverse=True)


def test_shapes_against_closed_forms() -> None:
    peak, span = WARMUP - 1, STEPS - WARMUP  # the decay begins after the last step of warmup
    for step in range(peak, STEPS):
        t = (step - peak) / span
        cosine = FINAL + (1 - FINAL) * (1 + math.cos(math.pi * t)) / 2
        assert values("cosine")[step] == pytest.approx(cosine, abs=1e-12)
        assert values("linear")[step] == pytest.approx(1 - (1 - FINAL) * t, abs=1e-12)
        assert values("constant")[step] == 1.0


def test_wsd_holds_then_decays_over_its_fraction() -> None:
    curve = values("wsd", decay_fraction=0.2)
    decay = round(0.2 * STEPS)
    held, decayed = curve[WARMUP - 1 : STEPS - decay], curve[STEPS - decay :]
    assert set(held) == {1.0}
    assert decayed == [pytest.approx(1 - (1 - FINAL) * (i + 1) / decay) for i in range(decay)]
    assert values("wsd", decay_fraction=1.0) == pytest.approx(values("linear"))


def test_one_step_runs_at_the_peak() -> None:
    assert multiplier(0, 1, ScheduleConfig(warmup_steps=0)) == 1.0
