"""`steepest plan` as a person meets it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from steepest import cli

RUN = """
[model]
hidden_size = 16
layers = 1
heads = 2
intermediate_size = 32

[data]
batch_size = 4
sequence_length = 16

[optimizer]
name = "lion"

[training]
steps = 40
gradient_accumulation = 2
"""


def plan(*arguments: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["steepest", "plan", *arguments])
        try:
            cli.main()
        except SystemExit as stop:
            return stop.code if isinstance(stop.code, int) else 0
    return 0


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("STEEPEST_CACHE", str(tmp_path / "cache"))
    Path("run.toml").write_text(RUN)


def test_a_file_and_flags_become_a_plan(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert plan("run.toml", "--optimizer", "muon", "--gpu", "H100", "4090", "--mfu", "0.25") == 0
    text = capsys.readouterr().out
    for part in (
        "llama, 35.4 k parameters",
        "muon, lr 0.02",
        "40 of 4 × 16 tokens, in parts of 2 × 16",
        "2.56 k tokens, 0.0724 per parameter",
        "activations of 2 rows",
        "time, at least",
        "this machine, measured",
        "H100 80GB HBM3",
        "H100 PCIe",
        "GeForce RTX 4090",
        "at 25 % (--mfu)",
    ):
        assert part in text, text
    assert "B200" not in text
    assert max(map(len, text.splitlines())) <= 100
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["run.toml"]


def test_a_large_model_is_planned_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan("--model", "llama-13b", "--data.batch-size", "256", "--optimizer", "adamw") == 0
    text = capsys.readouterr().out
    assert "13.0 B parameters" in text
    assert "Not measured on this machine:" in text
    assert "Where it does not fit, more training.gradient_accumulation" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("no.toml",), "no.toml"),
        (("--model", "llama-60"), "'llama-60m'"),
        (("--optimizer", "muonn"), "'muon'"),
        (("--gpu", "H1000"), "unknown GPU 'H1000'"),
        (("--mfu", "40"), "above 0 and at most 1, not 40.0"),
        (("--gpus", "H100"), "'--gpu'"),
        (("--data", "nowhere"), "'nowhere' is neither an embedded corpus"),
        (("--runtime.device", "gpu"), "use cpu, cuda or cuda:N"),
    ],
)
def test_wrong_input_is_one_sentence(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan(*arguments) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("steepest: ")
    assert message.casefold() in error.casefold()
    assert "\n" not in error
