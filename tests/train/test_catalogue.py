"""Every optimizer of the catalogue in the training loop."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import steepest
from steepest.errors import UserError
from steepest.train import OptimizerConfig, Runtime, build, run
from steepest.train.learner import Learner
from steepest.train.schedules import multiplier

from .conftest import MakeConfig
from .test_resume import Stop, assert_same_bits, stop_at

RUNTIME = Runtime(threads=1, log_every=1, checkpoint_every=4)
CPU = torch.device("cpu")


@pytest.mark.parametrize("name", steepest.names())
def test_resumed_to_the_bit(
    name: str, make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(name=name, lr=1e-3, steps=10, every=5)
    whole = run(config, tmp_path / "whole", runtime=RUNTIME)

    monkeypatch.setattr("steepest.train.loop.PROGRESS_SECONDS", 0)
    with pytest.raises(Stop):
        run(config, tmp_path / "killed", runtime=RUNTIME, on_progress=stop_at(6))
    resumed = run(config, tmp_path / "killed", runtime=RUNTIME)

    assert whole["status"] == "finished"
    assert whole["val_loss"] == resumed["val_loss"]
    final = Path("checkpoints") / f"step-{10:09d}.pt"
    assert_same_bits(
        torch.load(tmp_path / "whole" / whole["hash"] / final, weights_only=True),
        torch.load(tmp_path / "killed" / whole["hash"] / final, weights_only=True),
    )


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
