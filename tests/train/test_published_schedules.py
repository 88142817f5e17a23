"""Schedules of papers and programs, against those programs or their formulas written down again."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from steepest.errors import UserError
from steepest.train import multiplier, published

Formula = Callable[[int, int, int], float]

CASES = [(5, 2), (20, 5), (40, 8), (100, 10), (128, 11), (1000, 300), (1003, 17)]
"""Steps and warmup steps."""


def values(name: str, steps: int, warmup: int, **changes: Any) -> list[float]:
    schedule = published(name, warmup_steps=warmup, **changes)
    return [multiplier(step, steps, schedule) for step in range(steps)]


@pytest.mark.parametrize(("name", "shape"), [("epfl_cosine", "cos"), ("epfl_linear", "linear")])
@pytest.mark.parametrize(("steps", "warmup"), CASES)
@pytest.mark.parametrize("final", [1.0, 0.1, 10.0])
def test_one_cycle(name: str, shape: str, steps: int, warmup: int, final: float) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=1.0,
        total_steps=steps,
        pct_start=warmup / steps,
        anneal_strategy=shape,  # type: ignore[arg-type]
        div_factor=100,
        final_div_factor=final,
        cycle_momentum=False,
    )
    expected = []
    for _ in range(steps):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if len(expected) < steps:
            scheduler.step()
    found = values(name, steps, warmup, final_lr_ratio=0.01 / final)
    assert found == pytest.approx(expected, abs=1e-9)
    assert (found[0], found[warmup - 1]) == (0.01, 1.0)
    assert found[-1] == pytest.approx(0.01 / final, rel=1e-12)


def epfl_wsd(
    s: int, steps: int, warmup: int, shape: str = "sqrt", end: tuple[float, float] = (0.2, 0.0)
) -> float:
    fraction, final = end
    decay = int(fraction * steps)
    hold = steps - decay
    if s < warmup:
        return s / warmup + (1 - s / warmup) / 100
    if s < hold:
        return 1.0
    x = (s - hold) / decay
    if shape == "exponential":
        return math.pow(final, x)
    cosine = final + (1 - final) * (1 + math.cos(math.pi * x)) * 0.5
    line = final + (1 - final) * (1 - x)
    return {
        "linear": line,
        "cosine": cosine,
        "mirror_cosine": 2 * line - cosine,
        "square": final + (1 - final) * (1 - x**2),
        "sqrt": final + (1 - final) * (1 - math.sqrt(x)),
    }[shape]


def epfl_cos_inf(s: int, steps: int, warmup: int) -> float:
    if s < warmup:
        return s / warmup + (1 - s / warmup) / 100
    last = steps - steps // 4
    part = (s - warmup) / (last - warmup)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * part)) if s < last else 0.1


def galore(s: int, steps: int, warmup: int) -> float:
    if s < warmup:
        return s / warmup
    return 0.1 + 0.9 * (1 + math.cos(math.pi * (s - warmup) / (steps - warmup))) / 2


def galore_linear(s: int, steps: int, warmup: int) -> float:
    if s < warmup:
        return float(s) / float(max(1, warmup))
    return max(0.0, float(steps - s) / float(max(1, steps - warmup)))


def torchtitan(s: int, steps: int, warmup: int) -> float:
    stable = 1  # steps at the peak after warmup: the run is taken to be one step longer
    if s < warmup:
        return (s + 1) / warmup
    if s < warmup + stable:
        return 1.0
    part = (s + 1 - warmup - stable) / (steps - warmup)
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * part))


def torchtitan_wsd(s: int, steps: int, warmup: int, decay: int, shape: str) -> float:
    held = steps + 1 - decay  # the run is taken to be one step longer
    if s < warmup:
        return (s + 1) / warmup
    if s < held:
        return 1.0
    part = (s + 1 - held) / decay
    return {
        "linear": 1 - part,
        "sqrt": 1 - math.sqrt(part),
        "cosine": 0.5 * (1 + math.cos(math.pi * part)),
    }[shape]


def modded_nanogpt(s: int, steps: int, warmup: int) -> float:
    if s < warmup:
        return (s + 1) / warmup
    decay = int(0.2 * steps)
    return 1.0 if s < steps - decay else (steps - s) / decay


def transformer(s: int, steps: int, warmup: int) -> float:
    width = 512
    peak = width**-0.5 * warmup**-0.5
    return width**-0.5 * min((s + 1) ** -0.5, (s + 1) * warmup**-1.5) / peak


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("epfl_wsd", epfl_wsd),
        ("epfl_cos_inf", epfl_cos_inf),
        ("galore_cosine", galore),
        ("galore_linear", galore_linear),
        ("torchtitan_cosine", torchtitan),
        ("modded_nanogpt_trapezoid", modded_nanogpt),
        ("transformer_inverse_sqrt", transformer),
    ],
)
@pytest.mark.parametrize(("steps", "warmup"), CASES)
def test_formulas(name: str, formula: Formula, steps: int, warmup: int) -> None:
    changes = {"constant_steps": steps // 4} if name == "epfl_cos_inf" else {}
    expected = [formula(step, steps, warmup) for step in range(steps)]
    assert values(name, steps, warmup, **changes) == pytest.approx(expected, abs=1e-14)


@pytest.mark.parametrize("settings", [{}, *({"decay_shape": s} for s in ("sqrt", "cosine"))])
@pytest.mark.parametrize("floor", [0.0, 0.1])
@pytest.mark.parametrize("ratio", [0.2, 0.29, 0.5])
@pytest.mark.parametrize(("steps", "warmup"), CASES)
def test_torchtitan_with_a_ratio_of_decay(
    settings: dict[str, str], floor: float, ratio: float, steps: int, warmup: int
) -> None:
    decay, shape = round(ratio * steps), settings.get("decay_shape", "linear")
    factors = [torchtitan_wsd(s, steps, warmup, decay, shape) for s in range(steps)]
    expected = [f if s < warmup else floor + (1 - floor) * f for s, f in enumerate(factors)]
    changes: dict[str, Any] = {"decay_fraction": (decay + 0.5) / steps, **settings}
    changes |= {"final_lr_ratio": floor} if floor else {}
    assert values("torchtitan_wsd", steps, warmup, **changes) == pytest.approx(expected, abs=1e-14)


@pytest.mark.parametrize(
    "shape", ["linear", "sqrt", "square", "cosine", "mirror_cosine", "exponential"]
)
@pytest.mark.parametrize(("steps", "fraction"), [(100, 0.1), (128, 0.2), (100, 0.29), (1003, 0.9)])
def test_every_cooldown_is_that_of_the_program(shape: str, steps: int, fraction: float) -> None:
    choices: dict[str, Any] = {"decay_fraction": fraction, "decay_shape": shape}
    found = values("epfl_wsd", steps, 10, final_lr_ratio=0.05, **choices)
    expected = [epfl_wsd(s, steps, 10, shape, (fraction, 0.05)) for s in range(steps)]
    assert found == pytest.approx(expected, abs=1e-14)


def test_corners_of_runs_as_they_were_launched() -> None:
    cosine = values("epfl_cosine", 128_000, 2000)  # llm-optimizer-benchmark, 124m
    assert cosine[500] == pytest.approx(0.155, abs=1e-3)  # a line would be at 0.26
    assert (cosine[0], cosine[1999], cosine[-1]) == (0.01, 1.0, 0.01)
    wsd = values("epfl_wsd", 128_000, 2000)
    assert (wsd[0], wsd[2000], wsd[102_400]) == (0.01, 1.0, 1.0)
    assert wsd[102_401] == pytest.approx(1 - 25_600**-0.5)
    stage_1 = values("galore_cosine", 60_000, 6000)
    assert (stage_1[0], stage_1[3000], stage_1[6000]) == (0.0, 0.5, 1.0)
    assert 0.1 < stage_1[-1] < 0.1 + 1e-8
    stage_2 = values("torchtitan_cosine", 30_720, 1024)
    assert (stage_2[0], stage_2[1023], stage_2[1024]) == (1 / 1024, 1.0, 1.0)
    line = values("galore_linear", 60_000, 6000)
    assert (line[0], line[6000], line[33_000]) == (0.0, 1.0, 0.5)
    assert line[-1] == pytest.approx(1 / 54_000)
    held = values("torchtitan_wsd", 30_720, 1024, decay_fraction=0.1)
    assert (held[1023], held[27_648], held[29_184]) == (1.0, 1.0, 0.5)
    assert held[-1] == pytest.approx(1 / 3072)


def test_an_unknown_one_is_named() -> None:
    with pytest.raises(UserError, match="did you mean 'epfl_cosine'"):
        published("epfl_cosin")
