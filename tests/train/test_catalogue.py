"""Every optimizer of the catalogue in the training loop."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import steepest
from steepest import data
from steepest.errors import UserError
from steepest.train import OptimizerConfig, Runtime, build, run
from steepest.train.learner import Learner
from steepest.train.schedules import multiplier

from .conftest import MakeConfig

RUNTIME = Runtime(threads=1, log_every=1, checkpoint_every=4)
CPU = torch.device("cpu")
KILLED = Path(__file__).with_name("killed_runs.py")


@pytest.mark.slow
def test_every_optimizer_continues_to_the_bit_after_a_kill(
    make_config: MakeConfig, tmp_path: Path, child_environment: dict[str, str]
) -> None:
    file = tmp_path / "run.toml"
    file.write_text(make_config(lr=1e-3, steps=10, every=5).to_toml())
    data.prepare(make_config().data.corpus, 300)
    done = subprocess.run(
        [sys.executable, str(KILLED), str(file), str(tmp_path), *steepest.names()],
        env={**child_environment, "CUDA_VISIBLE_DEVICES": ""},  # forks and CUDA do not mix
        text=True, capture_output=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {}, done.stderr


def test_every_group_follows_the_schedule(make_config: MakeConfig) -> None:
    config = make_config(name="muon", lr=0.02, options={"adam_lr": 0.003}, warmup_steps=4)
    learner = Learner(config, CPU)
    peaks = [group["initial_lr"] for group in learner.optimizer.param_groups]
    assert {0.02, 0.003} <= set(peaks)
    tokens = torch.arange(64).reshape(4, 16)
    for step in range(config.training.steps):
        factor = multiplier(step, config.training.steps, config.schedule)
        lrs = [group["lr"] for group in learner.optimizer.param_groups]
        assert lrs == pytest.approx([peak * factor for peak in peaks])
        learner.model.loss(tokens, tokens).backward()  # type: ignore[no-untyped-call]
        learner.optimizer.step()
        learner.advance()


def test_clipping_is_of_the_new_gradient_where_the_last_is_kept(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    # ScionLight is Scion with its momentum in the gradients: under clipping the same steps.
    options = {"ns_dtype": "float32", "scale": 10.0, "head_scale": 30.0}
    common = {"lr": 0.02, "options": options, "clip_norm": 0.3, "gradient_accumulation": 2}
    results = [
        run(make_config(name=name, steps=12, every=4, **common), tmp_path, runtime=RUNTIME)
        for name in ("scion", "scion_light")
    ]
    assert results[0]["val_loss"] < results[0]["initial_val_loss"] - 0.3
    assert results[1]["val_loss"] == pytest.approx(results[0]["val_loss"], rel=1e-3)


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("muoon", {}, "did you mean 'muon'"),
        ("muon", {"momentun": 0.9}, "did you mean 'momentum'"),
    ],
)
def test_wrong_names_get_a_sentence(
    name: str, options: dict[str, float], sentence: str, make_config: MakeConfig
) -> None:
    learner = Learner(make_config(), CPU)
    with pytest.raises(UserError, match=sentence):
        build(OptimizerConfig(name=name, options=options), learner.model)
