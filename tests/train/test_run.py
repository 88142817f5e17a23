"""Whole runs: what they write, what they depend on, and what they do not."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

from steepest import data
from steepest.cli import train
from steepest.errors import UserError
from steepest.models import Llama
from steepest.train import (
    Preempted,
    Progress,
    RunConfig,
    Runtime,
    StopRequest,
    read_metrics,
    resolve,
    run,
)
from steepest.train.evaluation import Score, evaluate
from steepest.train.learner import Learner
from steepest.train.loop import Training

from .conftest import MEASURED, MakeConfig

EVERY_STEP = Runtime(log_every=1, checkpoint_every=0, threads=1)
CPU = torch.device("cpu")


def folder_of(result: dict[str, object], runs: Path) -> Path:
    return runs / str(result["hash"])


def test_a_run_writes_what_it_promises(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(steps=25, every=10)
    seen: list[Progress] = []
    result = run(config, tmp_path, runtime=EVERY_STEP, on_progress=seen.append)
    folder = folder_of(result, tmp_path)

    assert json.loads((folder / "result.json").read_text()) == result
    saved = RunConfig.from_toml(folder / "config.toml")
    assert saved.hash() == folder.name == result["hash"]
    assert saved == RunConfig.from_dict(result["config"])

    metrics = read_metrics(folder / "metrics.jsonl")
    steps = [(record["kind"], record["step"]) for record in metrics]
    expected = [("eval", 0)]
    for step in range(1, 26):
        expected += [("train", step), ("eval", step)][: 2 if step in (10, 20, 25) else 1]
    assert steps == expected
    tokens = config.data.batch_size * config.data.sequence_length
    assert all(record["tokens"] == record["step"] * tokens for record in metrics)
    seconds = [record["seconds"] for record in metrics]
    assert seconds == sorted(seconds)
    losses = [record["loss"] for record in metrics if record["kind"] == "train"]
    assert statistics.mean(losses[-5:]) < losses[0] - 0.3

    evaluations = [record["val_loss"] for record in metrics if record["kind"] == "eval"]
    assert result["initial_val_loss"] == evaluations[0]
    assert result["val_loss"] == evaluations[-1] < evaluations[0]
    assert (result["status"], result["steps"], result["tokens"]) == ("finished", 25, 25 * tokens)
    assert result["diverged_at_step"] is None
    assert result["reason"] is None
    model = Llama(config.model)
    assert result["parameters"] == sum(p.numel() for p in model.parameters())
    assert result["parameter_bytes"] == 4 * result["parameters"]
    assert result["state_bytes"] == 2 * result["parameter_bytes"]  # Adam's two moments
    assert 0 < result["optimizer_ms"] < result["step_ms"]
    assert result["tokens_per_second"] == pytest.approx(tokens / result["step_ms"] * 1000)
    assert result["seconds"] == pytest.approx(25 * result["step_ms"] / 1000, rel=1.0)

    environment = json.loads((folder / "environment.json").read_text())
    assert environment["torch"] == torch.__version__
    assert environment["threads"] == 1
    assert [session["step"] for session in environment["sessions"]] == [0]
    assert (seen[0].phase, seen[0].step) == ("preparing", 0)
    assert (seen[-1].phase, seen[-1].step) == ("done", 25)


def test_every_loss_is_there_in_bits_per_byte_and_as_perplexity(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config(steps=6, every=3, train_tokens=256, windows=(2,), **{"averaging.every": 1})
    result = run(config, tmp_path, runtime=EVERY_STEP)
    tokens = data.prepare(config.data.corpus, config.data.vocab_size)
    seen = tokens.train.bytes_per_token * math.log(2)
    held_out = tokens.validation.bytes_per_token * math.log(2)
    for record in read_metrics(folder_of(result, tmp_path) / "metrics.jsonl"):
        if record["kind"] == "train":
            assert record["bits_per_byte"] == pytest.approx(record["loss"] / seen)
            continue
        assert record["val_bits_per_byte"] == pytest.approx(record["val_loss"] / held_out)
        assert record["train_bits_per_byte"] == pytest.approx(record["train_loss"] / seen)
        assert record["averaged_bits_per_byte"] == pytest.approx(
            {name: loss / held_out for name, loss in record["averaged"].items()}
        )
        assert record["val_perplexity"] == pytest.approx(math.exp(record["val_loss"]))
        assert record["averaged_perplexity"] == pytest.approx(
            {name: math.exp(loss) for name, loss in record["averaged"].items()}
        )
    assert set(record["averaged_bits_per_byte"]) == {"window_2"}
    assert result["val_bits_per_byte"] == record["val_bits_per_byte"]
    assert result["averaged_bits_per_byte"] == record["averaged_bits_per_byte"]
    assert result["val_perplexity"] == record["val_perplexity"]
    assert result["averaged_perplexity"] == record["averaged_perplexity"]
    ending = train._ending(result, tmp_path)
    assert (
        f"{result['val_loss']:.4f} nats per token, perplexity {result['val_perplexity']:.0f},"
        in (ending)
    )


def test_a_perplexity_too_large_to_say_is_null(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(*_: Any, **__: Any) -> Score:
        return Score(710.0, 3.0)

    monkeypatch.setattr("steepest.train.evaluation.evaluate", lost)
    config = make_config(steps=6, every=3, ema=(0.5,), **{"averaging.every": 1})
    result = run(config, tmp_path, runtime=EVERY_STEP)
    records = read_metrics(folder_of(result, tmp_path) / "metrics.jsonl")
    for told in (result, *(r for r in records if r["kind"] == "eval")):
        assert (told["val_loss"], told["val_perplexity"]) == (710.0, None)
        averages = [] if told.get("step") == 0 else ["ema_0.5"]
        assert told["averaged_perplexity"] == dict.fromkeys(averages)
    assert "perplexity" not in train._ending(result, Path("runs"))


def test_a_complete_run_returns_at_once(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(steps=6)
    result = run(config, tmp_path, runtime=EVERY_STEP)
    seen: list[Progress] = []
    assert run(config, tmp_path, runtime=EVERY_STEP, on_progress=seen.append) == result
    assert seen == []


def test_same_config_same_bits_whatever_the_global_state(
    make_config: MakeConfig, momentum_file: Path, tmp_path: Path
) -> None:
    # The optimizer draws from torch's global generator.
    config = make_config(
        steps=12, name=f"{momentum_file}:Momentum", lr=0.1, options={"noise": 0.001}
    )
    runs = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        result = run(config, tmp_path / str(seed), runtime=EVERY_STEP)
        assert torch.equal(torch.get_rng_state(), before)
        metrics = read_metrics(folder_of(result, tmp_path / str(seed)) / "metrics.jsonl")
        runs.append([{k: v for k, v in record.items() if k not in MEASURED} for record in metrics])
    assert runs[0] == runs[1]


def test_two_seeds_are_two_runs_with_one_validation_set(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    first = run(make_config(steps=6, seed=0), tmp_path, runtime=EVERY_STEP)
    second = run(make_config(steps=6, seed=1), tmp_path, runtime=EVERY_STEP)
    assert first["hash"] != second["hash"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [first["hash"], second["hash"]]
    )
    assert first["initial_val_loss"] != second["initial_val_loss"]  # other initial weights
    assert first["initial_val_loss"] == pytest.approx(second["initial_val_loss"], abs=0.05)


def test_logging_and_checkpoints_do_not_change_a_run(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config(steps=15)
    plain = run(config, tmp_path / "a", runtime=Runtime(checkpoint_every=0, log_every=100))
    busy = run(config, tmp_path / "b", runtime=Runtime(checkpoint_every=2, log_every=1))
    assert plain["val_loss"] == busy["val_loss"]
    assert plain["hash"] == busy["hash"]


SETTLED: dict[str, dict[str, Any]] = {
    "finished": {"name": "adamw", "ema": (0.9,)},
    "not finite": {"name": "torch.optim:SGD", "lr": 1e12, "clip_norm": 0.0},
    "high": {"name": "torch.optim:SGD", "lr": 1e3, "steps": 60},
    "skipping": {"name": "sophia_g", "lr": 1e6, "nonfinite": "skip", "steps": 60},
}


@pytest.mark.parametrize("case", SETTLED)
def test_steps_settled_together_tell_what_they_do_one_by_one(
    case: str, make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(**SETTLED[case])
    found = []
    for name, kinds in (("at once", ("cpu",)), ("later", ())):
        monkeypatch.setattr("steepest.train.loop.SETTLES_AT_ONCE", kinds)
        result = run(config, tmp_path / name, runtime=Runtime(threads=1, log_every=8))
        metrics = read_metrics(folder_of(result, tmp_path / name) / "metrics.jsonl")
        assert result["tokens_per_second"] == pytest.approx(
            result["tokens"] / result["steps"] / result["step_ms"] * 1000
        )
        times = (*MEASURED, "tokens_per_second")
        found.append(
            [
                {k: v for k, v in record.items() if k not in times and not k.endswith("_ms")}
                for record in (result, *metrics)
            ]
        )
    assert found[0] == found[1]
    assert (found[0][0]["status"] == "finished") == (case == "finished")


@pytest.mark.parametrize("at_once", [True, False])
def test_a_run_asked_to_stop_where_it_diverges_ends(
    at_once: bool, make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not at_once:
        monkeypatch.setattr("steepest.train.loop.SETTLES_AT_ONCE", ())
    config = make_config(**SETTLED["not finite"])
    stop, whole = StopRequest(), Training.train_step

    def asked(self: Training) -> None:
        whole(self)
        stop.asked = self.step == 3

    monkeypatch.setattr(Training, "train_step", asked)
    result = run(config, tmp_path, runtime=Runtime(threads=1), stop=stop)
    assert (result["status"], result["diverged_at_step"]) == ("diverged", 3)


def test_a_run_stops_after_the_step_at_which_it_is_asked(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("steepest.train.loop.SETTLES_AT_ONCE", ())
    config, stop, whole = make_config(), StopRequest(), Training.train_step

    def asked(self: Training) -> None:
        whole(self)
        stop.asked = self.step == 3

    runtime = Runtime(threads=1, log_every=1000)
    with monkeypatch.context() as patch:
        patch.setattr(Training, "train_step", asked)
        with pytest.raises(Preempted, match="saved after step 3"):
            run(config, tmp_path / "stopped", runtime=runtime, stop=stop)
    (folder,) = (tmp_path / "stopped").iterdir()
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-000000003.pt"]
    resumed = run(config, tmp_path / "stopped", runtime=runtime)
    assert resumed["val_loss"] == run(config, tmp_path / "whole", runtime=runtime)["val_loss"]


def test_what_was_wrong_at_the_beginning_is_told_at_once(
    make_config: MakeConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config, runtime = make_config(steps=6), Runtime(threads=1, checkpoint_every=3)
    folder = folder_of(run(config, tmp_path, runtime=runtime), tmp_path)
    assert caplog.messages == []
    (folder / "result.json").unlink()
    (folder / "checkpoints" / "step-000000006.pt").write_bytes(b"")
    result = run(config, tmp_path, runtime=runtime)
    (warning,) = result["warnings"]
    assert "step-000000006.pt could not be read" in warning
    assert caplog.messages == [warning]


def test_a_statistic_that_is_not_finite_is_null(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Learner.gradient

    def huge(self: Learner, *arguments: Any, **options: Any) -> Any:
        found = whole(self, *arguments, **options)
        return dataclasses.replace(found, statistics={"router_z": torch.tensor(math.inf)})

    monkeypatch.setattr(Learner, "gradient", huge)
    result = run(make_config(steps=6), tmp_path, runtime=EVERY_STEP)
    records = read_metrics(folder_of(result, tmp_path) / "metrics.jsonl")
    assert [r["router_z"] for r in records if r["kind"] == "train"] == [None] * 6


def test_evaluation_weighs_every_token_the_same(make_config: MakeConfig) -> None:
    config = make_config(tokens=16 * 7)  # seven sequences: no batch size divides them
    tokens = data.prepare(config.data.corpus, config.data.vocab_size)
    model = Llama(config.model)
    results = []
    for batch_size in (1, 4, 7):
        sized = make_config(tokens=16 * 7, batch_size=batch_size)
        results.append(evaluate(model, tokens.validation, sized, CPU, tokens=16 * 7).nats)
    assert results == pytest.approx([results[0]] * 3, abs=1e-6)

    # Independently: every sequence alone, every token once.
    losses = []
    for batch in data.validation_batches(
        tokens.validation, batch_size=1, sequence_length=16, max_tokens=16 * 7
    ):
        probabilities = model(batch.tokens)[0].double().log_softmax(-1)
        losses += [-probabilities[i, target].item() for i, target in enumerate(batch.targets[0])]
    assert len(losses) == 16 * 7
    assert results[0] == pytest.approx(statistics.mean(losses), abs=1e-5)


def test_bfloat16_trains_on_float32_weights(make_config: MakeConfig, tmp_path: Path) -> None:
    exact = run(make_config(), tmp_path, runtime=EVERY_STEP)
    rounded = run(make_config(precision="bfloat16"), tmp_path, runtime=EVERY_STEP)
    assert rounded["val_loss"] != exact["val_loss"]
    assert rounded["val_loss"] == pytest.approx(exact["val_loss"], abs=0.05)
    assert rounded["parameter_bytes"] == 4 * rounded["parameters"]


def test_the_folder_of_another_config_is_refused(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(steps=6)
    result = run(config, tmp_path, runtime=EVERY_STEP)
    file = folder_of(result, tmp_path) / "config.toml"
    file.write_text(file.read_text().replace("seed = 0", "seed = 1"))
    with pytest.raises(UserError, match=r"training\.seed is 1 in the file and 0 here"):
        run(config, tmp_path, runtime=EVERY_STEP)


def test_changed_content_is_not_run_under_the_old_name(make_config: MakeConfig) -> None:
    config = make_config()
    tokens = data.prepare(config.data.corpus, config.data.vocab_size)
    pinned = make_config(fingerprint="0" * 16)
    with pytest.raises(UserError, match=r"data\.fingerprint is 0000000000000000 in the config"):
        resolve(pinned, tokens)
    assert resolve(resolve(config, tokens), tokens) == resolve(config, tokens)


@pytest.mark.parametrize(
    ("device", "sentence"),
    [("gpu", "Unknown device 'gpu'; use cpu"), ("meta", "'meta' is not supported; use cpu")],
)
def test_unusable_device(
    device: str, sentence: str, make_config: MakeConfig, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=sentence):
        run(make_config(), tmp_path, runtime=Runtime(device=device))
