"""The command line as a person meets it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import steepest
from steepest import cli, models
from steepest.cli.arguments import flags_of
from steepest.cli.commands import COMMANDS


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["steepest", *arguments])
    try:
        cli.main()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0
    return 0


@pytest.mark.parametrize(
    ("arguments", "right"),
    [
        (("rase",), "'race'"),
        (("race", "adamww"), "'adamw'"),
        (("race", "--seedz", "2"), "'--seeds'"),
        (("race", "--model", "llama-60"), "'llama-60m'"),
        (("race", "--lrs", "quick"), "positive numbers"),
        (("race", "adamw", "adamw"), "adamw is named twice"),
        (("race", "mine.py:Mine"), "mine.py"),
        (("race", "adamw", "--baseline", "lion"), "lion"),
        (("race", "--corpus", "no/such.txt"), "no/such.txt"),
        (("train", "no.toml"), "no.toml"),
        (("train", "--optimizer.nam", "lion"), "'--optimizer.name'"),
        (("train", "--optimizer.name", "lionn"), "'lion'"),
        (("optimizers", "soup"), "'soap'"),
        (("optimizers", "soap", "adamw"), "adamw"),
        (("models", "--bogus"), "--bogus"),
        (("report", "nowhere"), "race.json"),
    ],
)
def test_wrong_input_is_one_sentence_and_exit_2(
    arguments: tuple[str, ...],
    right: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, *arguments) == 2
    message = capsys.readouterr().err.strip()
    assert message.startswith("steepest: ")
    assert right in message
    assert "\n" not in message
    assert "Traceback" not in message
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("command", list(COMMANDS))
def test_help_explains_every_flag(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    assert run(monkeypatch, command, "--help") == 0
    text = capsys.readouterr().out
    kind, _ = COMMANDS[command]
    assert " ".join((kind.__doc__ or "").split())[:40] in " ".join(text.split())
    for flag in flags_of(kind):
        assert flag.split(".")[-1] in text


def test_overview_lists_the_commands(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch) == 0
    text = capsys.readouterr().out
    assert all(f"steepest {command}" in text for command in COMMANDS)


def test_lists_are_complete(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "optimizers") == 0
    text = capsys.readouterr().out
    assert all(name in text for name in steepest.names())
    assert run(monkeypatch, "models") == 0
    text = capsys.readouterr().out
    assert all(name in text for name in models.sizes())


@pytest.mark.parametrize("name", steepest.names())
def test_an_optimizer_in_detail(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert run(monkeypatch, "optimizers", name) == 0
    text = capsys.readouterr().out
    assert all(key in text for key in steepest.describe(name).hyperparameters)


def test_train_from_file_and_flags(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.toml").write_text(
        '[data]\nbatch_size = 2\nsequence_length = 32\n[optimizer]\nname = "lion"\nlr = 1e-3\n'
        "[schedule]\nwarmup_steps = 1\n[training]\nsteps = 3\n[evaluation]\ntokens = 64\n"
    )
    flags = ("--optimizer.options", "weight_decay", "0.1", "--training.steps", "2")
    flags += ("--dynamics", "1")
    assert run(monkeypatch, "train", *flags, "run.toml") == 0
    assert "lion finished" in capsys.readouterr().out
    (config,) = Path("results/runs").glob("*/config.toml")
    text = config.read_text()
    assert "steps = 2" in text
    assert "weight_decay = 0.1" in text
    assert (config.parent / "dynamics.jsonl").stat().st_size > 0
