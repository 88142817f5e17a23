"""Weight-decay schedules: what they do to weights that have no gradient."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import steepest
from steepest.errors import UserError
from steepest.train import RunConfig, Runtime, ScheduleConfig, TrainingConfig, multiplier, run
from steepest.train.learner import Learner
from steepest.train.schedules import Schedules

from .conftest import MakeConfig
from .test_resume import Stop, assert_same_bits, stop_at

STEPS, LR, DECAY = 20, 0.1, 0.2
KINDS = ["constant", "proportional", "independent"]
SHRINKAGE = {
    "constant": lambda factor: LR * factor * DECAY,
    "proportional": lambda factor: LR * factor**2 * DECAY,
    "independent": lambda factor: LR * DECAY,
}
"""Part that a step takes of a weight, by the factor on the learning rate."""


def schedule_of(kind: str, **changes: Any) -> ScheduleConfig:
    return ScheduleConfig(warmup_steps=5, weight_decay=kind, **changes)  # type: ignore[arg-type]


def of_torch(weight: torch.nn.Parameter) -> torch.optim.Optimizer:
    return torch.optim.AdamW([weight], lr=LR, weight_decay=DECAY)


def of_the_catalogue(weight: torch.nn.Parameter) -> torch.optim.Optimizer:
    return steepest.create("adamw", [weight], lr=LR, weight_decay=DECAY)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [of_torch, of_the_catalogue])
def test_a_weight_without_gradient_shrinks_as_its_kind_says(kind: str, make: Any) -> None:
    weight = torch.nn.Parameter(torch.ones(3, 3, dtype=torch.float64))
    optimizer = make(weight)
    schedule = schedule_of(kind)
    schedules = Schedules(optimizer, schedule, STEPS)
    for step in range(STEPS):
        schedules.set(step)
        before = weight.detach().clone()
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
        part = SHRINKAGE[kind](multiplier(step, STEPS, schedule))
        torch.testing.assert_close(weight.detach(), before * (1 - part), rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_every_group_keeps_its_own_decay(kind: str, make_config: MakeConfig) -> None:
    # Muon's groups have decays and learning rates of their own, and vectors have no decay.
    options = {"weight_decay": 0.2, "adam_weight_decay": 0.05, "adam_lr": 0.003}
    config = make_config(name="muon", lr=0.02, options=options, **{"schedule.weight_decay": kind})
    learner = Learner(config, torch.device("cpu"))
    groups = learner.optimizer.param_groups
    # The wanted products of a step, where the schedule is at its peak.
    wanted = {0.02: 0.2, 0.003: 0.05}
    decayed = [group["weight_decay"] > 0 for group in groups]
    assert any(decayed)
    assert not all(decayed)
    for step in range(config.training.steps):
        factor = multiplier(step, config.training.steps, config.schedule)
        exponent = {"constant": 0, "proportional": 1, "independent": -1}[kind]
        for group, decays in zip(groups, decayed, strict=True):
            peak = wanted[group["initial_lr"]] * decays
            assert group["lr"] == pytest.approx(group["initial_lr"] * factor)
            assert group["weight_decay"] == pytest.approx(peak * factor**exponent)
        learner.advance()


def test_the_kinds_meet_at_the_peak_and_part_after_it(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    results = {}
    for kind in KINDS:
        config = make_config(
            name="adamw",
            options={"weight_decay": 1.0},
            lr=0.03,
            warmup_steps=0,
            steps=8,
            **{"schedule.weight_decay": kind},
        )
        results[kind] = run(config, tmp_path, runtime=Runtime(threads=1, checkpoint_every=0))
    assert len({result["hash"] for result in results.values()}) == 3
    assert len({result["val_loss"] for result in results.values()}) == 3


@pytest.mark.parametrize("kind", ["proportional", "independent"])
def test_resumed_to_the_bit(
    kind: str, make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = Runtime(threads=1, log_every=1, checkpoint_every=4)
    changes = {"schedule.weight_decay": kind}
    config = make_config(name="adamw", options={"weight_decay": 0.5}, steps=12, **changes)
    whole = run(config, tmp_path / "whole", runtime=runtime)
    monkeypatch.setattr("steepest.train.loop.PROGRESS_SECONDS", 0)
    with pytest.raises(Stop):
        run(config, tmp_path / "killed", runtime=runtime, on_progress=stop_at(6))
    run(config, tmp_path / "killed", runtime=runtime)
    final = Path(whole["hash"]) / "checkpoints" / f"step-{12:09d}.pt"
    assert_same_bits(
        torch.load(tmp_path / "whole" / final, weights_only=True),
        torch.load(tmp_path / "killed" / final, weights_only=True),
    )


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"final_lr_ratio": 0.0}, "which is 0 at step 30; give schedule.final_lr_ratio"),
        (
            {"warmup_start_ratio": 0.0, "first_step": 0},
            "which is 0 at step 1; give schedule.warmup_start_ratio",
        ),
    ],
)
def test_decay_independent_of_a_rate_of_zero_is_refused(
    changes: dict[str, Any], sentence: str
) -> None:
    training = TrainingConfig(steps=30)
    RunConfig(schedule=schedule_of("proportional", **changes), training=training)
    schedule = schedule_of("independent", **changes)
    with pytest.raises(UserError, match=sentence):
        RunConfig(schedule=schedule, training=training)


@pytest.mark.parametrize("name", steepest.names())
def test_no_method_minds_a_first_step_without_learning_rate(name: str) -> None:
    # GaLore's schedule begins at 0, and proportional decay with it.
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(8, 6), torch.nn.Linear(6, 8))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = steepest.create(name, model, lr=1e-2, weight_decay=0.1)
    schedule = schedule_of("proportional", warmup_start_ratio=0.0, first_step=0)
    schedules = Schedules(optimizer, schedule, STEPS)
    tokens = torch.arange(8)
    for step in range(4):
        schedules.set(step)
        if "sampled_labels" in optimizer.wants() or "previous_weights" in optimizer.wants():
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(tokens), tokens).backward()
            optimizer.observe()
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(tokens), tokens.flip(0)).backward()
        optimizer.step()
        if step == 0:
            assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(value.isfinite().all() for value in model.state_dict().values())
    assert any(not torch.equal(before[key], value) for key, value in model.state_dict().items())
