"""Batches made ahead are those that steps would make, and no thread outlives its run."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from steepest.train import RunConfig, Runtime, feeding, read_metrics, run

from .conftest import MEASURED, MakeConfig
from .test_resume import Stop, stop_at

RUNTIME = Runtime(threads=1, log_every=1, checkpoint_every=7)
RAMP: dict[str, Any] = {
    "batch.schedule": "ramp", "start_rows": 2, "increment_rows": 2, "ramp_rows": 60,
    "batch_size": 8, "gradient_accumulation": 4, "packing": "documents",
}  # fmt: skip
NORM_TEST: dict[str, Any] = {
    "batch.schedule": "norm_test", "eta": 0.5, "max_rows": 16, "gradient_accumulation": 2,
}  # fmt: skip
DIVERGING: dict[str, Any] = {"name": "torch.optim:SGD", "lr": 1e12, "clip_norm": 0.0}


def records(config: RunConfig, runs: Path) -> list[dict[str, Any]]:
    result = run(config, runs, runtime=RUNTIME)
    found = read_metrics(runs / result["hash"] / "metrics.jsonl")
    return [{k: v for k, v in record.items() if k not in MEASURED} for record in found]


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Make batches ahead on CPUs, too; returns what was made so."""
    made: list[str] = []

    class Counted(feeding.Prefetcher):
        def __next__(self) -> Any:
            made.append(self._thread.name)
            return super().__next__()

    monkeypatch.setattr(feeding, "AHEAD_ON", ("cpu",))
    monkeypatch.setattr(feeding, "Prefetcher", Counted)
    return made


@pytest.mark.parametrize(
    ("changes", "used"),
    [({}, True), (RAMP, True), (NORM_TEST, False)],
    ids=["fixed", "ramp", "test"],
)
def test_the_losses_are_the_same(
    changes: dict[str, Any], used: bool, make_config: MakeConfig, tmp_path: Path, ahead: list[str]
) -> None:
    config = make_config(**changes)
    made_ahead = records(config, tmp_path / "ahead")
    assert bool(ahead) == used
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feeding, "AHEAD_ON", ())
        assert records(config, tmp_path / "asked for") == made_ahead
    assert "prefetch" not in [thread.name for thread in threading.enumerate()]


def test_a_continued_run_gets_its_own_batches(
    make_config: MakeConfig, tmp_path: Path, ahead: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(**RAMP)
    whole = records(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr("steepest.train.loop.PROGRESS_SECONDS", 0)
        with pytest.raises(Stop):
            run(config, tmp_path / "cut", runtime=RUNTIME, on_progress=stop_at(17))
    assert "prefetch" not in [thread.name for thread in threading.enumerate()]
    assert records(config, tmp_path / "cut") == whole


def test_a_run_that_diverges_ends_its_thread(
    make_config: MakeConfig, tmp_path: Path, ahead: list[str]
) -> None:
    result = run(make_config(**DIVERGING), tmp_path, runtime=RUNTIME)
    assert (result["status"], bool(ahead)) == ("diverged", True)
    assert "prefetch" not in [thread.name for thread in threading.enumerate()]
