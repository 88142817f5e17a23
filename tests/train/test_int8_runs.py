"""Runs whose optimizer keeps the hidden matrices in int8."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

import steepest
from steepest.errors import UserError
from steepest.optim import Int8Weight
from steepest.optim.memory import held
from steepest.train import RunConfig, Runtime, checkpoints, read_metrics, run, trained
from steepest.train.evaluation import evaluate
from steepest.train.learner import Learner
from steepest.train.parallel import Parallel
from steepest.train.resolving import open_data

from .conftest import MakeConfig
from .test_parallel import free_port, losses, one_process
from .test_resume import Stop, assert_same_bits, stop_at

CPU = torch.device("cpu")
NAMES = ["q_galore", "q_apollo"]
OPTIONS: dict[str, Any] = {"group_size": 64, "rank": 4, "update_interval": 4}
WATCHED = Runtime(threads=1, log_every=1, checkpoint_every=4, dynamics_every=5)


def config_of(make_config: MakeConfig, name: str, **changes: Any) -> RunConfig:
    given = {"name": name, "lr": 3e-2, "options": OPTIONS, "steps": 12, "every": 6, **changes}
    return make_config(**given)


def test_only_these_optimizers_store_int8(make_config: MakeConfig) -> None:
    stored = set()
    for name in steepest.names():
        learner = Learner(make_config(name=name, lr=1e-3), CPU)
        if any(isinstance(p, Int8Weight) for p in learner.parameters):
            stored.add(name)
    assert stored == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_run_takes_the_memory_that_the_command_says(
    name: str, make_config: MakeConfig, tmp_path: Path
) -> None:
    config = config_of(make_config, name)
    result = run(config, tmp_path, runtime=Runtime(threads=1))
    learner = Learner(config, CPU)
    model = type(learner.model)(config.model)  # type: ignore[call-arg]
    counted = held(name, model, **OPTIONS)
    assert result["parameter_bytes"] == sum(row.parameter_bytes for row in counted)
    assert result["memory_bytes"]["weights"] == result["parameter_bytes"]
    assert result["state_bytes"] == sum(row.state_bytes for row in counted)
    hidden = next(row for row in counted if row.role == "hidden")
    assert hidden.parameter_bytes < 1.2 * hidden.parameters
    assert {learner.roles[p] for p in learner.parameters if isinstance(p, Int8Weight)} == {"hidden"}


@pytest.mark.parametrize("name", NAMES)
def test_a_run_learns_is_watched_and_continues_to_the_bit(
    name: str, make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(
        make_config, name, steps=20, gradient_accumulation=2,
        **{"averaging.ema": (0.5,), "averaging.windows": (2,), "averaging.every": 2},
    )  # fmt: skip
    whole = run(config, tmp_path / "whole", runtime=WATCHED)
    assert whole["val_loss"] < whole["initial_val_loss"] - 0.1
    assert set(whole["averaged"]) == {"ema_0.5", "window_2"}
    assert all(loss < whole["initial_val_loss"] for loss in whole["averaged"].values())
    folder = tmp_path / "whole" / whole["hash"]
    steps = [r for r in read_metrics(folder / "metrics.jsonl") if r["kind"] == "train"]
    assert all(0 < record["update_ratio"]["hidden"] < 1 for record in steps[:-1])
    dynamics = [r for r in read_metrics(folder / "dynamics.jsonl") if r["role"] == "hidden"]
    assert len({record["name"] for record in dynamics}) == 7
    assert all(record["update_norm"] > 0 for record in dynamics if record["step"] < 20)

    monkeypatch.setattr("steepest.train.loop.PROGRESS_SECONDS", 0)
    with pytest.raises(Stop):
        run(config, tmp_path / "cut", runtime=WATCHED, on_progress=stop_at(7))
    run(config, tmp_path / "cut", runtime=WATCHED)
    states = [
        checkpoints.load(checkpoints.path_of(tmp_path / place / whole["hash"] / "checkpoints", 20))
        for place in ("whole", "cut")
    ]
    weights = [state["learner"]["model"] for state in states]
    for key, weight in weights[0].items():
        if isinstance(weight, Int8Weight):
            assert torch.equal(weight.codes, weights[1][key].codes), key
    assert_same_bits(*states)


@pytest.mark.parametrize("name", NAMES)
def test_the_trained_model_has_floats(name: str, make_config: MakeConfig, tmp_path: Path) -> None:
    config = config_of(make_config, name)
    result = run(config, tmp_path, runtime=Runtime(threads=1))
    found = trained.read(tmp_path / result["hash"])
    assert {type(weight) for weight in found.weights.values()} == {torch.Tensor}
    model = found.model()
    split = open_data(config.data).validation
    nats = evaluate(model, split, found.config, CPU, tokens=config.evaluation.tokens).nats
    assert nats == pytest.approx(result["val_loss"], rel=1e-6)


def test_wrapped_ones_step_floats(make_config: MakeConfig) -> None:
    learner = Learner(config_of(make_config, "q_apollo", wrap=("cautious",)), CPU)
    assert not any(isinstance(p, Int8Weight) for p in learner.parameters)


def test_shards_are_refused(make_config: MakeConfig) -> None:
    class Sharding(Parallel):
        in_step = True

    with pytest.raises(UserError, match="q_galore keeps weights in int8, which FSDP cannot shard"):
        Learner(config_of(make_config, "q_galore"), CPU, Sharding())


@pytest.mark.slow
def test_replicas_are_one_run(make_config: MakeConfig, tmp_path: Path) -> None:
    jobs, alone = [], {}
    for name in NAMES:
        config = config_of(make_config, name, steps=6, every=3)
        file = tmp_path / f"{name}.toml"
        file.write_text(config.to_toml())
        jobs.append(f"ddp\n{file}")
        runtime = Runtime(threads=1, log_every=1, checkpoint_every=0)
        alone[name] = losses(tmp_path / "one", run(config, tmp_path / "one", runtime=runtime))
    mp.spawn(one_process, args=(2, free_port(), str(tmp_path), jobs), nprocs=2)
    for path in (tmp_path / "ddp").glob("*/result.json"):
        result = json.loads(path.read_text())
        # Rounding decides at random which way a weight goes.
        assert losses(tmp_path / "ddp", result) == pytest.approx(
            alone[result["optimizer"]], rel=2e-3
        )
