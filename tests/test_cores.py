"""The number of cores that work is split by."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from steepest.cores import cores


@pytest.mark.parametrize(
    ("quota", "count"), [("max 100000", 6), ("250000 100000", 2), ("10000 100000", 1)]
)
def test_cores_are_those_that_may_be_used(
    quota: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(6), raising=False)
    monkeypatch.setattr(Path, "read_text", lambda _: quota)
    assert cores() == count
