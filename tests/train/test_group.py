"""Processes that meet, and what they say when one of them fails."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from steepest.errors import UserError
from steepest.train import FailedElsewhere, Runtime, run
from steepest.train.group import LOST, meet, one_voice, wait_for_all
from steepest.train.stopping import Preempted

from .conftest import MakeConfig
from .test_parallel import free_port

LOSS = dist.DistError("Connection closed by peer")


def fail(store: dist.Store, error: BaseException) -> BaseException:
    """Return what an error of a process becomes for its caller."""
    with pytest.raises(BaseException) as caught, one_voice(store):  # noqa: PT011
        raise error
    return caught.value


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> dist.Store:
    """Return the store of two processes, of which this is the second."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    return dist.HashStore()


def test_the_first_to_fail_raises_its_error(store: dist.Store) -> None:
    first, second = UserError("No."), ArithmeticError("No number.")
    assert fail(store, first) is first
    for error, code in ((second, LOST), (UserError("Nor I."), 2), (LOSS, LOST)):
        found = fail(store, error)
        assert isinstance(found, FailedElsewhere)
        assert (found.code, found.untold, found.__cause__) == (code, False, error)


def test_a_loss_is_told_once_and_does_not_silence_its_cause(store: dist.Store) -> None:
    losses, cause = [fail(store, LOSS) for _ in range(2)], OSError("The disk is full.")
    assert [loss.untold for loss in losses if isinstance(loss, FailedElsewhere)] == [True, False]
    assert fail(store, cause) is cause


@pytest.mark.parametrize("error", [KeyboardInterrupt(), Preempted(3), SystemExit(4)])
def test_what_is_no_failure_is_raised_in_all(error: BaseException, store: dist.Store) -> None:
    assert fail(store, error) is error
    assert fail(store, error) is error


def test_who_waits_hears_that_one_does_not_come(store: dist.Store) -> None:
    fail(store, UserError("No."))
    with pytest.raises(FailedElsewhere, match="Another process of the run failed"):
        wait_for_all(store)


def test_a_group_without_a_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(UserError, match="WORLD_SIZE is 'two' in the environment, not a number"):
        meet()
    monkeypatch.setenv("WORLD_SIZE", "")
    assert meet() is None


def both(
    environment: dict[str, str], folders: tuple[Path, Path], *arguments: str, nodes: bool = False
) -> tuple[list[int], list[str]]:
    """Give the command in two folders, as on two machines; return exit codes and what they said.

    With `nodes` they start processes on two machines, else they are two that torchrun started.
    """
    port, processes = str(free_port()), []
    for rank, folder in enumerate(folders):
        own = ["--runtime.nodes", "2", "--runtime.node-rank", str(rank)] if nodes else []
        own += ["--runtime.rendezvous", f"127.0.0.1:{port}"] if nodes else []
        place = {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": port}
        place = {} if nodes else {**place, "MASTER_ADDR": "127.0.0.1"}
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", "steepest", "train", *arguments, *own], cwd=folder,
                env={**environment, **place, "GLOO_SOCKET_IFNAME": "lo"},
                text=True, stderr=subprocess.PIPE,
            )
        )  # fmt: skip
    said = [process.communicate(timeout=300)[1] for process in processes]
    return [process.returncode for process in processes], said


@pytest.mark.slow
def test_wrong_arguments_are_told_by_one_process(
    child_environment: dict[str, str], tmp_path: Path
) -> None:
    codes, said = both(child_environment, (tmp_path, tmp_path), "--optimizer.lr", "x")
    assert codes == [2, 2]
    assert "".join(said) == "steepest: --optimizer.lr must be a number, not 'x'.\n"


@pytest.mark.slow
@pytest.mark.parametrize("nodes", [True, False])
def test_a_machine_without_the_folder_to_resume_ends_the_command_on_all(
    nodes: bool, make_config: MakeConfig, child_environment: dict[str, str], tmp_path: Path
) -> None:
    name = str(
        run(make_config(name="adamw", steps=6), tmp_path, runtime=Runtime(threads=1))["hash"]
    )
    folders = tmp_path / "first", tmp_path / "second"
    for folder in folders:
        folder.mkdir()
    shutil.move(tmp_path / name, folders[0])
    os.remove(folders[0] / name / "result.json")
    codes, said = both(child_environment, folders, "--resume", name, nodes=nodes)
    assert codes == ([2, 2] if nodes else [LOST, 2])
    assert f"steepest: Cannot read {name}/config.toml" in said[1]
    assert "".join(said).count("Cannot read") == 1
    assert ("a process has failed, and says why where it is; the code is 2." in said[0]) == nodes
    assert not (folders[0] / name / "result.json").exists()
