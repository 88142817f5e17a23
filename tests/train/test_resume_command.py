"""`steepest train --resume`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from steepest.cli.train import train_one
from steepest.errors import UserError
from steepest.train import Runtime, run

from .conftest import MakeConfig


def resume(folder: Path, *arguments: str) -> None:
    train_one(["--resume", str(folder), "--runtime.threads", "1", *arguments])


@pytest.fixture
def short(make_config: MakeConfig, tmp_path: Path) -> Path:
    """The folder of a run that has lost its result."""
    config = make_config(name="adamw", steps=6, precision="auto")
    folder = tmp_path / str(run(config, tmp_path, runtime=Runtime(threads=1))["hash"])
    (folder / "result.json").unlink()
    return folder


def test_resume_continues_the_run_of_a_folder(short: Path, make_config: MakeConfig) -> None:
    resume(short, "--optimizer.lr", "0.01")  # as it is
    (short / "result.json").unlink()
    file = short.parent / "run.toml"
    file.write_text(make_config(name="adamw", steps=6).to_toml())
    resume(short, str(file))
    assert (short / "result.json").exists()
    assert len([path for path in short.parent.iterdir() if path.is_dir()]) == 1


CHANGES: dict[str, Any] = {
    "one": (["--optimizer.lr", "0.002"], ["optimizer.lr is 0.01 in {} and 0.002 here"]),
    "two": (
        ["--training.seed", "3", "--evaluation.every", "2"],
        ["evaluation.every is 10 in {} and 2 here", "training.seed is 0 in {} and 3 here"],
    ),
    "optimizer": (
        ["--optimizer", "lion"],
        ["optimizer.name is \"adamw\" in {} and \"lion\" here", "optimizer.options.betas is "],
    ),
    "corpus": (
        ["--data.corpus", "{}/other.txt"],
        ["data.fingerprint is "],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CHANGES)
def test_resume_names_what_differs(case: str, short: Path, corpus: Path) -> None:
    flags, clauses = CHANGES[case]
    (short / "other.txt").write_text("\f".join(corpus.read_text().split("\f")[:40]))
    with pytest.raises(UserError) as caught:
        resume(short, *(flag.format(short) for flag in flags))
    for clause in clauses:
        assert clause.format(short) in str(caught.value)
    assert not (short / "result.json").exists()


def test_resume_needs_a_run_under_its_name(short: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Cannot read .*nowhere/config\.toml"):
        resume(tmp_path / "nowhere")
    other = short.rename(tmp_path / "other")
    with pytest.raises(UserError, match=f"holds run {short.name}, whose folder must have that"):
        resume(other)
