"""What the terminal tells of a single run."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from steepest.report.live import LiveRun
from steepest.train import Progress


@pytest.mark.parametrize(
    ("told", "detail"),
    [
        ({"step": 0, "loss": None, "tokens_per_second": 0.0}, "0 tokens/s"),
        (
            {"step": 5, "loss": 3.25, "mfu": 0.4321, "seconds_left": 400.0},
            "loss 3.250, 12,345 tokens/s, 43.2% MFU, about 6.7 min left",
        ),
        ({"step": 10, "loss": 3.0, "seconds_left": 0.0}, "loss 3.000, 12,345 tokens/s"),
    ],
)
def test_loss_speed_utilisation_and_time_left(told: dict[str, float], detail: str) -> None:
    values = {"steps": 10, "tokens": 100, "tokens_per_second": 12345.0, "phase": "training", **told}
    with LiveRun(Console(file=io.StringIO())) as watcher:
        watcher(Progress(**values))
        (task,) = watcher.bar.tasks
    assert task.fields["detail"] == detail
    assert (task.completed, task.total) == (told["step"], 10)
