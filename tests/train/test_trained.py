"""Trained models read back from runs: the weights that were evaluated, the tokenizer they had."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from steepest.data import preparation
from steepest.data.sources import open_source
from steepest.data.symbols import ByteTokenizer
from steepest.errors import UserError
from steepest.train import RunConfig, Runtime, checkpoints, evaluation, read_metrics, run, trained
from steepest.train.export import export
from steepest.train.resolving import open_data

from .conftest import MakeConfig

SAVING = Runtime(threads=1, checkpoint_every=10)


@pytest.fixture(scope="module")
def keep_all() -> Iterator[None]:
    """Keep all of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "prune", lambda *given, **more: None)
        yield


@pytest.fixture(scope="module")
def averaged(
    make_config: MakeConfig, keep_all: None, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The folder of a run whose optimizer evaluates averages, with checkpoints at 10 and 20."""
    config = make_config(
        name="schedulefree_adamw", steps=20, warmup_steps=0, **{"schedule.name": "constant"}
    )
    runs = tmp_path_factory.mktemp("averaged")
    return runs / str(run(config, runs, runtime=SAVING)["hash"])


def loss(model: trained.Trained) -> float:
    config = model.config
    split = open_data(config.data).validation
    cpu = torch.device("cpu")
    return evaluation.evaluate(
        model.model(), split, config, cpu, tokens=config.evaluation.tokens
    ).nats


@pytest.mark.parametrize("step", [10, 20])
def test_evaluation_weights_are_those_that_were_evaluated(averaged: Path, step: int) -> None:
    recorded = {
        line["step"]: line["val_loss"]
        for line in read_metrics(averaged / "metrics.jsonl")
        if line["kind"] == "eval"
    }
    file = checkpoints.path_of(averaged / "checkpoints", step)
    model = trained.read(file)
    assert model.step == step
    assert loss(model) == pytest.approx(recorded[step], rel=1e-6)
    training = trained.read(file, "training")
    state = checkpoints.load(file)["learner"]["model"]
    assert training.weights.keys() == state.keys()
    assert all(torch.equal(training.weights[key], state[key]) for key in state)
    assert abs(loss(training) - recorded[step]) > 1e-3


def test_a_folder_of_a_run_is_its_newest_checkpoint(averaged: Path) -> None:
    assert trained.read(averaged).step == 20


@pytest.mark.usefixtures("keep_all")
def test_an_optimizer_without_averages_has_one_kind(
    make_config: MakeConfig, momentum_file: Path, tmp_path: Path
) -> None:
    mine = Path(shutil.copy(momentum_file, tmp_path / "mine.py"))
    config = make_config(steps=20, name=f"{mine}:Momentum", lr=0.1)
    folder = tmp_path / str(run(config, tmp_path, runtime=SAVING)["hash"])
    mine.unlink()  # Nothing below executes it.
    both = trained.read(folder, "training"), trained.read(folder, "evaluation")
    assert all(torch.equal(both[0].weights[key], both[1].weights[key]) for key in both[0].weights)
    half = checkpoints.path_of(folder / "checkpoints", 10)
    assert trained.read(half, "training").step == 10
    with pytest.raises(UserError, match="without running its code; choose the training weights"):
        trained.read(half)


def test_the_tokenizer_is_the_one_of_the_tokens(averaged: Path) -> None:
    config = RunConfig.from_toml(averaged / "config.toml")
    tokenizer = trained.open_tokenizer(config.data)
    document = open_data(config.data).validation.document(0).tolist()
    text = tokenizer.decode(document[:-1])
    assert text[0].isupper()
    (ids,) = tokenizer.encode_batch([text])
    assert [*ids.tolist(), tokenizer.end] == document


def test_a_prepared_corpus_and_a_changed_one(
    make_config: MakeConfig, corpus: Path, tmp_path: Path
) -> None:
    prepared = tmp_path / "prepared"
    preparation.prepare(open_source(str(corpus)), ByteTokenizer(), prepared, held_out=0.2)
    config = make_config(corpus=str(prepared), steps=5)
    folder = tmp_path / str(run(config, tmp_path, runtime=SAVING)["hash"])
    model = trained.read(folder)
    assert trained.open_tokenizer(model.config.data).name == "bytes"
    export(folder, tmp_path / "model")
    described = json.loads((tmp_path / "model" / "config.json").read_text())
    assert (described["vocab_size"], described["eos_token_id"]) == (300, 256)

    shutil.rmtree(prepared)
    with pytest.raises(UserError, match="prepared' is neither an embedded corpus"):
        export(folder, tmp_path / "other")
    shorter = tmp_path / "shorter.txt"
    shorter.write_text("\f".join(corpus.read_text().split("\f")[:40]))
    preparation.prepare(open_source(str(shorter)), ByteTokenizer(), prepared, held_out=0.2)
    with pytest.raises(UserError, match="is not the one that the run was trained on; restore"):
        export(folder, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_what_is_no_checkpoint_is_a_sentence(averaged: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere is neither a checkpoint nor the folder of a run"):
        trained.read(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"holds no checkpoints/step-\*\.pt"):
        trained.read(tmp_path)
    copy = tmp_path / "run"
    shutil.copytree(averaged, copy)
    file = checkpoints.path_of(copy / "checkpoints", 20)
    file.write_bytes(file.read_bytes()[:-3000])
    with pytest.raises(UserError, match=r"step-000000020\.pt could not be read"):
        trained.read(copy)
    file.unlink()
    assert trained.read(copy).step == 10
    config = copy / "config.toml"
    config.write_text(config.read_text().replace("seed = 0", "seed = 1"))
    with pytest.raises(UserError, match="is not a checkpoint of the run in"):
        trained.read(copy)
    config.unlink()
    with pytest.raises(UserError, match=r"Cannot read .*config\.toml"):
        trained.read(copy)
