"""The processes that steepest starts, on one machine or several: they end with one code."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from steepest.errors import UserError
from steepest.train import REQUEUE
from steepest.train.group import LOST
from steepest.train.processes import Place, run_together

from .test_parallel import free_port

ENDS = """
import os, signal, sys, time
rank, world = os.environ["RANK"], os.environ["WORLD_SIZE"]
ending = sys.argv[1 + int(rank)]
if ending == "listens":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
if ending in ("listens", "starts"):
    open(os.path.join(sys.argv[-1], rank), "w").close()
    time.sleep(60)
if ending == "killed":
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(int(ending))
"""


@pytest.mark.parametrize(
    ("endings", "code"),
    [
        (("0", "0"), 0),
        (("0", "3"), 3),
        (("75", "75"), REQUEUE),
        (("3", "listens"), 3),
        (("69", "killed"), 137),
        (("69", "69"), LOST),
    ],
)
def test_the_code_of_several_processes(
    endings: tuple[str, ...], code: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    command = [sys.executable, "-c", ENDS, *endings, str(tmp_path)]
    assert run_together(command, Place(len(endings))) == code
    assert capfd.readouterr().err.count("process 1 was killed by SIGKILL") == (code == 137)


def ask_when_both_are_there(folder: Path, asked: int) -> None:
    while len(list(folder.iterdir())) < 2:
        time.sleep(0.02)
    os.kill(asked, signal.SIGTERM)


def test_a_process_that_did_not_listen_yet_is_no_failure(tmp_path: Path) -> None:
    asking = threading.Thread(target=ask_when_both_are_there, args=(tmp_path, os.getpid()))
    asking.start()
    command = [sys.executable, "-c", ENDS, "listens", "starts", str(tmp_path)]
    assert run_together(command, Place(2)) == REQUEUE
    asking.join()


def start_machine(command: list[str], place: Place) -> None:
    """Be the process that starts those of one machine."""
    try:
        sys.exit(run_together(command, place))
    except UserError as error:
        Path(command[-1], f"error {place.node_rank}").write_text(str(error))
        sys.exit(2)


def two_machines(*endings: str, folder: Path, processes: tuple[int, int] = (1, 1)) -> list[Any]:
    """Return two processes that have started one or more each, as two machines would."""
    command = [sys.executable, "-c", ENDS, *endings, str(folder)]
    meeting = f"127.0.0.1:{free_port()}"
    forking = multiprocessing.get_context("fork")
    both = [
        forking.Process(target=start_machine, args=(command, Place(count, 2, rank, meeting)))
        for rank, count in enumerate(processes)
    ]
    for process in both:
        process.start()
    return both


@pytest.mark.parametrize(
    ("endings", "code"),
    [
        (("0", "0"), 0),
        (("75", "75"), REQUEUE),
        (("listens", "3"), 3),
        (("3", "listens"), 3),
        (("69", "killed"), 137),
        (("killed", "69"), 137),
    ],
)
def test_machines_end_with_the_same_code(
    endings: tuple[str, ...], code: int, tmp_path: Path
) -> None:
    both = two_machines(*endings, folder=tmp_path)
    for process in both:
        process.join(60)
    assert [process.exitcode for process in both] == [code, code]


def test_a_request_to_one_machine_ends_both(tmp_path: Path) -> None:
    both = two_machines("listens", "starts", folder=tmp_path)
    ask_when_both_are_there(tmp_path, both[1].pid)
    for process in both:
        process.join(60)
    assert [process.exitcode for process in both] == [REQUEUE, REQUEUE]


def test_machines_must_have_as_many_processes_each(tmp_path: Path) -> None:
    both = two_machines("0", "0", "0", folder=tmp_path, processes=(1, 2))
    for process in both:
        process.join(60)
    assert [process.exitcode for process in both] == [2, 2]
    assert "Machine 1 has 2 processes and machine 0 has 1" in (tmp_path / "error 0").read_text()


def test_a_machine_that_waits_for_another_can_be_stopped(tmp_path: Path) -> None:
    forking = multiprocessing.get_context("fork")
    for rank in (0, 1):
        place = Place(1, 2, rank, f"127.0.0.1:{free_port()}")
        process = forking.Process(target=start_machine, args=([str(tmp_path)], place))
        process.start()
        time.sleep(0.5)
        process.terminate()
        process.join(60)
        assert process.exitcode == REQUEUE
