"""The command, asked to stop: it saves, says so by its exit code, and continues."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from steepest.cli.train import train_one
from steepest.errors import UserError
from steepest.train import REQUEUE, RunConfig, Runtime, processes, read_metrics, run

from .conftest import MakeConfig
from .test_resume import assert_same_run

STEPS = 60
SLOW = """
import time
from torch.optim import AdamW


class Slow(AdamW):
    def step(self):
        super().step()
        time.sleep(0.05)
"""

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(scope="module")
def config(make_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run that takes seconds, so that it can be stopped within."""
    file = tmp_path_factory.mktemp("slow") / "slow.py"
    file.write_text(SLOW)
    return make_config(name=f"{file}:Slow", steps=STEPS, every=STEPS)


@pytest.fixture(scope="module")
def whole(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the run, done without interruption."""
    runs = tmp_path_factory.mktemp("whole")
    return runs / str(run(config, runs, runtime=Runtime(threads=1, log_every=1))["hash"])


@pytest.fixture
def start(config: RunConfig, tmp_path: Path, child_environment: dict[str, str]) -> Start:
    """Return a function that starts the command."""
    file = tmp_path / "run.toml"
    file.write_text(config.to_toml())

    def start(*arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "steepest", "train", *arguments]
        command += ["--runtime.threads", "1", "--runtime.log-every", "1"]
        return subprocess.Popen(
            command, env={**child_environment, "GLOO_SOCKET_IFNAME": "lo"},
            text=True, stderr=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    return start


def stop(process: subprocess.Popen[str], number: int, folder: Path, step: int) -> int:
    """Ask a process to stop once the run has done a step; return the last step that it did."""
    deadline = time.monotonic() + 120
    while len(read_metrics(folder / "metrics.jsonl")) <= step:
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(number)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == REQUEUE, (output, errors)
    last: int = read_metrics(folder / "metrics.jsonl")[-1]["step"]
    assert f"saved after step {last}; the same command continues" in errors
    assert not (folder / "result.json").exists()
    return last


@pytest.mark.slow
def test_a_stopped_command_continues_to_the_same_bits(
    start: Start, whole: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "runs" / whole.name
    again = (str(tmp_path / "run.toml"), "--out", str(tmp_path / "runs"))
    first = stop(start(*again), signal.SIGTERM, folder, 5)
    second = stop(start(*again), signal.SIGUSR1, folder, first + 5)
    assert 5 <= first < second < STEPS
    train_one([*again, "--runtime.threads", "1", "--runtime.log-every", "1"])
    assert_same_run(folder, whole)


@pytest.mark.slow
def test_several_processes_stop_together(
    start: Start, config: RunConfig, whole: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "runs" / whole.name
    command = [str(tmp_path / "run.toml"), "--out", str(tmp_path / "runs")]
    stop(start(*command, "--runtime.processes", "2"), signal.SIGTERM, folder, 5)
    run(config, folder.parent, runtime=Runtime(threads=1, log_every=1))
    losses = [
        [record.get("loss", record.get("val_loss")) for record in read_metrics(f / "metrics.jsonl")]
        for f in (folder, whole)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


ENDS = """
import os, signal, sys, time
rank, world = os.environ["RANK"], os.environ["WORLD_SIZE"]
ending = sys.argv[1 + int(rank)]
if ending == "listens":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
if ending in ("listens", "starts"):
    open(os.path.join(sys.argv[-1], rank), "w").close()
    time.sleep(60)
sys.exit(int(ending))
"""


@pytest.mark.parametrize(
    ("endings", "code"),
    [(("0", "0"), 0), (("0", "3"), 3), (("75", "75"), REQUEUE), (("3", "listens"), 3)],
)
def test_the_code_of_several_processes(endings: tuple[str, ...], code: int, tmp_path: Path) -> None:
    command = [sys.executable, "-c", ENDS, *endings, str(tmp_path)]
    assert processes.run_together(command, len(endings)) == code


def test_a_process_that_did_not_listen_yet_is_no_failure(tmp_path: Path) -> None:
    def ask_when_both_are_there() -> None:
        while len(list(tmp_path.iterdir())) < 2:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=ask_when_both_are_there, daemon=True).start()
    command = [sys.executable, "-c", ENDS, "listens", "starts", str(tmp_path)]
    assert processes.run_together(command, 2) == REQUEUE


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
