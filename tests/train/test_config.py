"""Configs: TOML, messages, identity."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import pytest

from steepest.errors import UserError
from steepest.train import BatchConfig, RunConfig, Runtime, parsing
from steepest.train.config import DataConfig, OptimizerConfig, TrainingConfig
from steepest.train.identity import config_hash, differences

PINNED = RunConfig(
    data=DataConfig(fingerprint="f" * 16), training=TrainingConfig(precision="float32")
)

OTHER_VALUES: dict[str, Any] = {
    "schedule.name": "wsd",
    "training.precision": "bfloat16",
    "training.nonfinite": "skip",
    "optimizer.options": {"weight_decay": 0.1},
    "optimizer.wrap": ("cautious",),
    "evaluation.at": (7, 30),
    "averaging.ema": (0.9, 0.99),
    "averaging.windows": (5,),
    "model.init": "normal",
    "model.mup_base_width": 32,
    "model.depth_scale": 1.4,
    "data.packing": "documents",
    "model.kv_heads": 2,
    "model.heads": 8,
    # A change that the rest of the config has to follow.
    "data.batch_size": 32,
    "training.gradient_accumulation": 2,
}
BATCHES: list[dict[str, Any]] = [
    {"schedule": "ramp", "start_rows": 4, "increment_rows": 6, "ramp_rows": 99},
    {"schedule": "norm_test", "eta": 0.5, "max_rows": 32},
]
TOGETHER: dict[str, dict[str, Any]] = {
    "data.context": {"packing": "documents", "context": 64},
    "schedule.first_step": {"first_step": 0},
    "schedule.warmup_shape": {"warmup_shape": "half_cosine"},
    "schedule.warmup_start_ratio": {"warmup_start_ratio": 0.5},
    "schedule.weight_decay": {"weight_decay": "proportional"},
    "schedule.decay_fraction": {"name": "wsd", "decay_fraction": 0.1},
    "schedule.decay_shape": {"name": "wsd", "decay_shape": "sqrt"},
    "schedule.constant_steps": {"name": "cosine_constant", "constant_steps": 5},
}
"""Values of fields that go with others only, or have few."""
NOT_IN_THE_HASH = {"data.corpus"}
ONE_VALUE = {"model.architecture"}


def leaves() -> list[str]:
    return [
        f"{section.name}.{leaf.name}"
        for section in dataclasses.fields(RunConfig)
        for leaf in dataclasses.fields(getattr(PINNED, section.name))
        if f"{section.name}.{leaf.name}" not in ONE_VALUE
    ]


def changed(leaf: str) -> RunConfig:
    section, name = leaf.split(".")
    part = getattr(PINNED, section)
    if leaf in TOGETHER:
        return dataclasses.replace(PINNED, **{section: dataclasses.replace(part, **TOGETHER[leaf])})
    if section == "batch":  # and these with parts of a batch
        training = dataclasses.replace(PINNED.training, gradient_accumulation=8)
        values = next(values for values in BATCHES if name in values)
        return dataclasses.replace(PINNED, batch=BatchConfig(**values), training=training)
    value = getattr(part, name)
    if leaf in OTHER_VALUES:
        other = OTHER_VALUES[leaf]
    elif isinstance(value, bool):
        other = not value
    elif isinstance(value, int):
        other = value * 2 if value else 1
    elif isinstance(value, float):
        other = value / 2 if value else 0.5
    else:
        other = value + "x"
    config = dataclasses.replace(part, **{name: other})
    if name == "vocab_size":  # model and data must agree
        return dataclasses.replace(
            PINNED,
            model=dataclasses.replace(PINNED.model, vocab_size=other),
            data=dataclasses.replace(PINNED.data, vocab_size=other),
        )
    return dataclasses.replace(PINNED, **{section: config})


@pytest.mark.parametrize("leaf", leaves())
def test_every_field_changes_the_hash_and_survives_toml(leaf: str, tmp_path: Path) -> None:
    config = changed(leaf)
    assert config != PINNED
    assert (config.hash() == PINNED.hash()) == (leaf in NOT_IN_THE_HASH)
    path = tmp_path / "run.toml"
    path.write_text(config.to_toml())
    assert RunConfig.from_toml(path) == config


def test_hash_is_that_of_the_content_not_of_its_spelling() -> None:
    spelled_out = RunConfig.from_dict(PINNED.to_dict())
    assert spelled_out.hash() == PINNED.hash()
    assert len(PINNED.hash()) == 12
    assert int(PINNED.hash(), 16) >= 0

    def with_options(lr: float, **options: Any) -> str:
        optimizer = OptimizerConfig(lr=lr, options=options)
        return dataclasses.replace(PINNED, optimizer=optimizer).hash()

    assert with_options(1) == with_options(1.0)
    assert with_options(1, a=2, b=(0.9, 1)) == with_options(1, b=[0.9, 1.0], a=2.0)
    assert with_options(1, flag=True) != with_options(1, flag=1)
    assert with_options(0.1) != with_options(0.1 + 1e-17 + 1e-16)


def test_hash_is_the_one_that_names_the_runs_on_disk() -> None:
    values = {
        "data": {"corpus": "anywhere.txt", "fingerprint": "f" * 16},
        "optimizer": {"name": "home/mine.py:Mine", "lr": 1.0, "source_sha256": "ab"},
    }
    canonical = (
        '{"data":{"fingerprint":"ffffffffffffffff"},'
        '"optimizer":{"lr":1,"name":":Mine","source_sha256":"ab"}}'
    )
    assert config_hash(values) == hashlib.sha256(canonical.encode()).hexdigest()[:12]


def test_hash_knows_files_by_content_not_by_place() -> None:
    def of(name: str, digest: str) -> str:
        optimizer = OptimizerConfig(name=name, source_sha256=digest)
        return dataclasses.replace(PINNED, optimizer=optimizer).hash()

    assert of("/here/mine.py:Mine", "aa") == of("there/copy.py:Mine", "aa")
    assert of("mine.py:Mine", "aa") != of("mine.py:Mine", "bb")
    assert of("mine.py:Mine", "aa") != of("mine.py:Other", "aa")
    with pytest.raises(ValueError, match="resolve the config first"):
        of("mine.py:Mine", "")
    with pytest.raises(ValueError, match="resolve the config first"):
        RunConfig().hash()
    with pytest.raises(ValueError, match=r"needs training\.precision: resolve the config first"):
        RunConfig(data=PINNED.data).hash()


@pytest.mark.parametrize("leaf", leaves())
def test_a_difference_is_what_changes_the_hash(leaf: str) -> None:
    found = differences(PINNED.to_dict(), changed(leaf).to_dict(), "there")
    assert bool(found) == (leaf not in NOT_IN_THE_HASH)
    assert found == [] or any(clause.startswith(leaf) for clause in found)


def test_differences_name_keys_and_both_values() -> None:
    there, here = PINNED.to_dict(), PINNED.to_dict()
    assert differences(there, RunConfig.from_dict(here).to_dict(), "runs/ab") == []
    here["optimizer"] |= {"lr": 0.002, "options": {"betas": [0.9, 0.99]}}
    here["training"] |= {"seed": 1}
    there["optimizer"] |= {"options": {"betas": (0.9, 0.95), "eps": 1.0}}
    here["data"] |= {"corpus": "elsewhere"}
    assert differences(there, here, "runs/ab") == [
        "optimizer.lr is 0.001 in runs/ab and 0.002 here",
        "optimizer.options.betas is [0.9, 0.95] in runs/ab and [0.9, 0.99] here",
        "optimizer.options.eps is 1 in runs/ab and not set here",
        "training.seed is 0 in runs/ab and 1 here",
    ]


def test_runtime_is_no_part_of_a_config() -> None:
    names = {field.name for field in dataclasses.fields(Runtime)}
    assert not names & {leaf.split(".")[1] for leaf in leaves()}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[training]\nstep = 3", "section [training]: Unknown key 'step'; did you mean 'steps'?"),
        ("[trainning]\nsteps = 3", "Unknown key 'trainning'; did you mean 'training'?"),
        ("[training]\nsteps = 1e3", "section [training]: steps must be an integer, not 1000.0."),
        ("[training]\nsteps = true", "steps must be an integer, not True."),
        ("[training]\nsteps = 0", "training.steps must be at least 1, not 0."),
        ("[training]\ncompile = 1", "compile must be true or false, not 1."),
        (
            "[training]\nprecision = 'fp16'",
            "precision must be one of 'auto', 'float32', 'bfloat16', 'pure_bfloat16', ",
        ),
        ("[optimizer]\nname = 3", "name must be a string, not 3."),
        ("[optimizer]\nlr = '1e-3'", "lr must be a number, not '1e-3'."),
        ("[optimizer]\nlr = -1", "optimizer.lr must be a positive number, not -1.0."),
        ("[optimizer]\nlr = nan", "optimizer.lr must be a positive number, not nan."),
        ("[optimizer]\noptions = 3", "options must be a table of hyperparameters, not 3."),
        ("[optimizer.options]\neps = inf", "optimizer.options.eps must be finite, not inf."),
        ("[optimizer.options]\nlr = 1", "the learning rate is optimizer.lr."),
        ("[optimizer.options.betas]\na = 1", "options.betas must be a number, a string"),
        ("training = 3", "section [training]: must be a table of keys, not 3."),
        ("[data]\nvocab_size = 2048", "set model.vocab_size to 2048 or more."),
        ("[data]\nbatch_size = 6\n[training]\ngradient_accumulation = 4", "does not divide"),
        ("[training]\nsteps = 5", "schedule.warmup_steps is 20; it must be less than"),
        ("[data]\nsequence_length = 4096", "longer than model.max_sequence_length"),
        ("[model]\nheads = 3", "hidden_size must be an even multiple of heads"),
        ("[training\n", "is not valid TOML"),
        ("[optimizer]\nlr = 1" + "0" * 400, "lr must be a number below 1.8e308."),
        ("[training]\nsteps = 1" + "0" * 20, "training.steps must be below 2^63, not 1000"),
        ("[averaging]\nwindows = [1" + "0" * 20 + "]", "averaging.windows must be below 2^63"),
        ("[optimizer.options]\nrank = 1" + "0" * 20, "optimizer.options.rank must be below 2^63"),
        (
            "[model]\narchitecture = 'moe'\nbalance_loss = nan",
            "model.balance_loss must be a finite number, not nan.",
        ),
        ("[model]\narchitecture = ['llama']", "section [model]: Unknown architecture"),
        ("[model]\nlayers = 10001", "model.layers must be at most 10,000, not 10001."),
        ("[runtime]\nthreads = 1", "[runtime] is no part of what a run is; give it by flags"),
        ("[data]\ncorpus = 'a\\u0000'".replace("'", '"'), "data.corpus must be Unicode text"),
        (
            "[evaluation]\nat = [5, 601]",
            "evaluation.at has step 601, beyond training.steps, which",
        ),
    ],
)
def test_wrong_input_gets_a_sentence_with_its_place(
    text: str, sentence: str, tmp_path: Path
) -> None:
    path = tmp_path / "run.toml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        RunConfig.from_toml(path)
    assert sentence in str(caught.value)
    assert str(path) in str(caught.value)


def test_text_that_toml_cannot_hold_is_refused() -> None:
    with pytest.raises(UserError, match=r"data\.corpus must be Unicode text without NUL"):
        RunConfig(data=DataConfig(corpus="a\udcff.txt"))
    assert RunConfig(data=DataConfig(corpus="sp\u00e4ter/\u65e5\u672c.txt")).to_toml()


@pytest.mark.parametrize(("every", "permanent"), [(100, 250), (0, 100), (7, 5)])
def test_permanent_checkpoints_are_some_of_those_that_there_are(every: int, permanent: int) -> None:
    with pytest.raises(UserError, match=f"permanent_every is {permanent}; it must be a multiple"):
        Runtime(checkpoint_every=every, permanent_every=permanent)
    assert Runtime(checkpoint_every=7, permanent_every=21).permanent_every == 21


def test_fields_of_a_file_are_had_before_they_are_held_against_each_other() -> None:
    values = {"training": {"steps": 3}, "optimizer": {"name": "muon"}}
    with pytest.raises(UserError, match=r"warmup_steps is 20; it must be less than"):
        RunConfig.from_dict(values)
    found = parsing.arguments_of(RunConfig, values, "here")
    assert found == {"training": TrainingConfig(steps=3), "optimizer": OptimizerConfig("muon")}


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Cannot read .*absent\.toml: No such file"):
        RunConfig.from_toml(tmp_path / "absent.toml")


def test_command_line_flags() -> None:
    tyro = pytest.importorskip("tyro")
    arguments = ["--training.steps", "50", "--optimizer.name", "muon", "--optimizer.lr", "0.02"]
    config = tyro.cli(RunConfig, args=arguments)
    assert (config.training.steps, config.optimizer.name, config.optimizer.lr) == (50, "muon", 0.02)
