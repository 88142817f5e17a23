"""The command line as a person meets it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import steepest
from steepest import cli, models
from steepest.cli import data, export, generate, optimizers, plan, race, train
from steepest.cli.arguments import flags_of
from steepest.cli.commands import BROKEN_PIPE, COMMANDS, INTERRUPTED, Command
from steepest.cli.models import Models

KINDS = {
    "race": race.Race,
    "train": train.Train,
    "plan": plan.Plan,
    "report": race.Report,
    "export": export.Export,
    "generate": generate.Generate,
    "data": data.Data,
    "optimizers": optimizers.Optimizers,
    "memory": optimizers.Memory,
    "models": Models,
}


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
        (("report",), "RACE is needed"),
        (("--halp",), "'--help'"),
        (("models", "--bogus"), "--help"),
        (("train", "config"), "whose name ends in .toml, and has no use for config"),
        (("race", "--batch-size", "0"), "--batch-size must be at least 1, not 0."),
        (("race", "adamw", "--out", "/dev/null/race", "--tokens", "2048"), "another with --out"),
        (("train", "--out", "/dev/null/runs"), "/dev/null/runs"),
        (("train", "--training.steps", "9" * 30), "training.steps"),
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
    kind = KINDS[command]
    assert " ".join((kind.__doc__ or "").split())[:40] in " ".join(text.split())
    for flag in flags_of(kind):
        assert flag.split(".")[-1] in text


@pytest.mark.parametrize("command", list(COMMANDS))
def test_the_overview_has_the_first_line_of_the_help(command: str) -> None:
    assert COMMANDS[command].summary == (KINDS[command].__doc__ or "").strip().splitlines()[0]


@pytest.mark.parametrize(
    "arguments", [["--help"], *([name, "--help"] for name in COMMANDS), ["optimizers"], ["models"]]
)
def test_a_reader_that_leaves_ends_the_command_quietly(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as output:
        monkeypatch.setattr(sys, "stdout", output)
        assert run(monkeypatch, *arguments) in (1, BROKEN_PIPE)  # 1 where rich has noticed
    assert capsys.readouterr().err == ""


def test_only_a_broken_pipe_of_the_output_is_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: list[str]) -> None:
        raise BrokenPipeError(32, "of a worker")

    monkeypatch.setattr(Command, "function", lambda _: broken)
    with pytest.raises(BrokenPipeError, match="worker"):
        run(monkeypatch, "models")


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("train", "steepest: stopped; the same command continues where this one was."),
        ("models", "steepest: stopped."),
    ],
)
def test_control_c_is_one_line(
    command: str,
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupted(_: list[str]) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Command, "function", lambda _: interrupted)
    handler = signal.getsignal(signal.SIGINT)
    try:
        assert run(monkeypatch, command) == INTERRUPTED
    finally:
        signal.signal(signal.SIGINT, handler)
    assert capsys.readouterr().err.strip() == sentence


def test_a_file_that_cannot_be_written_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def writing(_: list[str]) -> None:
        (tmp_path / "no" / "report.html").write_text("")

    monkeypatch.setattr(Command, "function", lambda _: writing)
    assert run(monkeypatch, "report") == 2
    expected = f"steepest: {tmp_path / 'no/report.html'}: No such file or directory.\n"
    assert capsys.readouterr().err == expected


def test_lack_of_memory_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Command, "function", lambda _: lambda _: torch.empty(1 << 50))
    assert run(monkeypatch, "train") == 2
    assert "steepest: There is not enough memory (" in capsys.readouterr().err
    monkeypatch.setattr(Command, "function", lambda _: lambda _: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="size"):
        run(monkeypatch, "train")


def test_help_and_unknown_commands_do_not_wait_for_torch() -> None:
    command = "import sys; from steepest.cli import main; sys.argv = ['steepest', 'rase']\n"
    command += "try: main()\nexcept SystemExit: print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", command], text=True) == "False\n"


def test_what_is_imported_late_is_listed() -> None:
    assert {*steepest.__all__, "optim", "__version__"} <= set(dir(steepest))
    assert all(getattr(steepest, name) is not None for name in dir(steepest))
    assert not hasattr(steepest, "optimizer")


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
    flags = ("--training.steps", "2", "--dynamics", "1", "--optimizer.options", "weight_decay=0.1")
    assert run(monkeypatch, "train", *flags, "run.toml") == 0
    assert "lion finished" in capsys.readouterr().out
    (config,) = Path("results/runs").glob("*/config.toml")
    text = config.read_text()
    assert "steps = 2" in text
    assert "weight_decay = 0.1" in text
    assert (config.parent / "dynamics.jsonl").stat().st_size > 0


def test_an_optimizer_has_its_own_lr_unless_told(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('[optimizer]\nname = "prodigy"\n')

    def lr(*arguments: str) -> float:
        return train.read(list(arguments))[0].optimizer.lr

    assert lr() == 1e-3
    assert lr("--optimizer", "prodigy") == lr(str(file)) == 1.0
    assert lr(str(file), "--optimizer.name", "muon") == lr("--optimizer.name=muon") == 0.02
    assert lr(str(file), "--optimizer.lr", "0.5") == 0.5
    assert lr("--optimizer.name", "muon", "--optimizer.lr=0.5") == 0.5
    assert lr("--optimizer", "torch.optim:SGD") == 1e-3
