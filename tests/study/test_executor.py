"""Worker processes of a race."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from steepest.study.executor import LocalExecutor


def test_control_c_of_a_terminal_is_left_to_the_race(tmp_path: Path) -> None:
    executor = LocalExecutor(1, tmp_path, lambda *_: None)
    try:
        blocked = executor.pool.submit(signal.pthread_sigmask, signal.SIG_BLOCK, []).result()
    finally:
        executor.close()
    assert signal.SIGINT in blocked
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_a_worker_is_no_process_of_a_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    executor = LocalExecutor(1, tmp_path, lambda *_: None)
    try:
        assert executor.pool.submit(os.getenv, "WORLD_SIZE").result() == "1"
    finally:
        executor.close()
    assert os.environ["WORLD_SIZE"] == "8"
