"""The command, asked to stop: it saves, says so by its exit code, and continues."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from steepest.cli.train import train_one
from steepest.train import REQUEUE, RunConfig, Runtime, checkpoints, read_metrics, run

from .conftest import MakeConfig
from .test_parallel import free_port, steps_begun
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

    def start(*arguments: str, **how: Any) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "steepest", "train", *arguments]
        command += ["--runtime.threads", "1", "--runtime.log-every", "1"]
        return subprocess.Popen(
            command, env={**child_environment, "GLOO_SOCKET_IFNAME": "lo"},
            text=True, stderr=subprocess.PIPE, stdout=subprocess.PIPE, **how,
        )  # fmt: skip

    return start


def wait_for_step(process: subprocess.Popen[str], folder: Path, step: int) -> None:
    deadline = time.monotonic() + 300
    while len(read_metrics(folder / "metrics.jsonl")) <= step:
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def stop(process: subprocess.Popen[str], number: int, folder: Path, step: int) -> int:
    """Ask a process to stop once the run has done a step; return the last step that it did."""
    wait_for_step(process, folder, step)
    process.send_signal(number)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == REQUEUE, (output, errors)
    last: int = read_metrics(folder / "metrics.jsonl")[-1]["step"]
    assert errors.count(f"saved after step {last}; the same command continues") == 1
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


@pytest.mark.slow
def test_processes_of_torchrun_save_when_it_is_told_to_end(
    start: Start, whole: Path, tmp_path: Path, child_environment: dict[str, str]
) -> None:
    """`start` has written the config; torchrun's own exit code is 1, whatever its processes' is."""
    folder = tmp_path / "runs" / whole.name
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    command += ["-m", "steepest", "train", str(tmp_path / "run.toml"), "--out", str(folder.parent)]
    command += ["--runtime.threads", "1", "--runtime.log-every", "1"]

    def torchrun() -> subprocess.Popen[str]:
        return subprocess.Popen(
            command, env={**child_environment, "GLOO_SOCKET_IFNAME": "lo"},
            text=True, stderr=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    process = torchrun()
    wait_for_step(process, folder, 5)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=300)
    last = read_metrics(folder / "metrics.jsonl")[-1]["step"]
    assert 5 <= last < STEPS
    assert errors.count(f"saved after step {last}; the same command continues") == 1
    assert process.returncode != 0, (output, errors)
    descendants_are_gone(folder)
    newest = checkpoints.newest(folder / "checkpoints")
    assert newest is not None
    assert checkpoints.load(newest)["step"] == last
    process = torchrun()
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, (output, errors)
    assert steps_begun(folder) == [0, last]
    both = [
        [record.get("loss", record.get("val_loss")) for record in read_metrics(f / "metrics.jsonl")]
        for f in (folder, whole)
    ]
    assert both[0] == pytest.approx(both[1], rel=1e-4)


def descendants_are_gone(folder: Path) -> None:
    """Check that no process works on the run any more."""
    with (folder / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.slow
def test_ctrl_c_saves_and_is_answered_once(start: Start, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / whole.name
    command = [str(tmp_path / "run.toml"), "--out", str(tmp_path / "runs")]
    process = start(*command, "--runtime.processes", "2", start_new_session=True)
    wait_for_step(process, folder, 5)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all processes
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 130
    assert errors.count("saved after step") == 1
    assert "Traceback" not in errors
    descendants_are_gone(folder)


@pytest.mark.slow
def test_a_killed_command_leaves_no_processes(start: Start, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / whole.name
    command = [str(tmp_path / "run.toml"), "--out", str(tmp_path / "runs")]
    process = start(*command, "--runtime.processes", "2")
    wait_for_step(process, folder, 5)
    process.kill()
    _, errors = process.communicate(timeout=60)  # until nobody holds the other ends
    descendants_are_gone(folder)
    last = read_metrics(folder / "metrics.jsonl")[-1]["step"]
    assert last < STEPS
    assert errors.count(f"saved after step {last};") == 1


FAILS = """
import os, signal
from torch.optim import AdamW


class {name}(AdamW):
    steps = 0

    def step(self):
        super().step()
        self.steps += 1
        if self.steps == 3 and os.environ["RANK"] == "1":
            {ending}
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "failure",
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", 137, "process 1 was killed by SIGKILL."),
        ("from steepest.errors import UserError; raise UserError('No.')", 2, "steepest: No."),
    ],
)
def test_a_process_that_fails_ends_all_and_is_told_of_once(
    failure: tuple[str, int, str], start: Start, make_config: MakeConfig, tmp_path: Path
) -> None:
    ending, code, sentence = failure
    file = tmp_path / "fails.py"
    file.write_text(FAILS.format(name="Fails", ending=ending))
    config = tmp_path / "fails.toml"
    config.write_text(make_config(name=f"{file}:Fails", steps=STEPS, every=STEPS).to_toml())
    runs = tmp_path / "runs"
    process = start(str(config), "--out", str(runs), "--runtime.processes", "2")
    _, errors = process.communicate(timeout=300)
    assert process.returncode == code, errors
    assert errors.count(sentence) == 1
    assert errors.count("Traceback (most recent call last)") == (code == 1)
    assert "gloo" not in errors or code == 137
    (folder,) = runs.iterdir()
    descendants_are_gone(folder)
