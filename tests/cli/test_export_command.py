"""`steepest export` and `steepest generate` on a run that `steepest train` did."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from steepest import cli

RUN = """
[model]
hidden_size = 16
layers = 1
heads = 2
intermediate_size = 32
vocab_size = 300
max_sequence_length = 64

[data]
corpus = "words.txt"
vocab_size = 300
batch_size = 4
sequence_length = 16

[optimizer]
name = "adamw"
lr = 1e-2

[schedule]
warmup_steps = 1

[training]
steps = 20

[evaluation]
tokens = 64
"""


def steepest(*arguments: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["steepest", *map(str, arguments)])
        try:
            cli.main()
        except SystemExit as stop:
            return stop.code if isinstance(stop.code, int) else 0
    return 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a run; the corpus is named relative to the one in which it was started."""
    place = tmp_path_factory.mktemp("place")
    documents = [f"Document {n} says: " + "the cat sat on the mat. " * 40 for n in range(30)]
    (place / "words.txt").write_text("\f".join(documents))
    (place / "run.toml").write_text(RUN)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("STEEPEST_CACHE", str(place / "cache"))
        assert steepest("train", "run.toml") == 0
        (found,) = place.glob("results/runs/*")
        yield found


def test_export_writes_and_then_refuses(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert steepest("export", str(folder), "--out", "model", "--dtype", "bfloat16") == 0
    said = capsys.readouterr().out.strip()
    assert said == "model: llama of step 20, trained with adamw, evaluation weights in bfloat16"
    assert json.loads(Path("model/config.json").read_text())["torch_dtype"] == "bfloat16"
    assert steepest("export", str(folder), "--out", "model") == 2
    assert "model exists and is not an empty folder" in capsys.readouterr().err
    (file,) = folder.glob("checkpoints/step-*.pt")
    assert steepest("export", str(file), "--weights", "training", "--out", "other") == 0
    assert "training weights in float32" in capsys.readouterr().out


def test_generate_continues_the_prompt(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def text(*flags: str) -> str:
        prompt = "the cat sat on the mat. the cat"
        assert steepest("generate", str(folder), "--prompt", prompt, *flags) == 0
        found = capsys.readouterr().out
        assert found.startswith(prompt)
        return found

    first = text("--tokens", "40", "--top-k", "50", "--seed", "3")
    assert first == text("--tokens", "40", "--top-k", "50", "--seed", "3")
    assert first != text("--tokens", "40", "--top-k", "50", "--seed", "4")
    greedy = text("--tokens", "40", "--temperature", "0")
    assert greedy == text("--tokens", "40", "--temperature", "5", "--top-p", "1e-9")
    assert len(text("--tokens", "1")) < len(greedy)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--prompt", ""), "--prompt must not be empty"),
        (("--prompt", "a", "--temperature", "-1"), "temperature must be 0 or a positive number"),
        (("--prompt", "a", "--temp", "1"), "'--temperature'"),
    ],
)
def test_generate_with_wrong_input(
    flags: tuple[str, ...], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert steepest("generate", str(folder), *flags) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("steepest: ")
    assert message in error
    assert "\n" not in error


def test_no_checkpoint_is_a_sentence(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (("export", "--out", "none"), ("generate", "--prompt", "a")):
        assert steepest(command[0], "nowhere", *command[1:]) == 2
        assert "nowhere is neither a checkpoint nor the folder of a run" in capsys.readouterr().err
    assert not Path("none").exists()
