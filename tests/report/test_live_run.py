"""What the terminal tells of a single run."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from steepest.report import live
from steepest.report.live import LiveRace, LiveRun
from steepest.study.executor import Task
from steepest.train import Progress, RunConfig

VALUES = {"steps": 10, "tokens": 100, "tokens_per_second": 12345.0, "phase": "training"}


def terminal(width: int) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, _environ={})


def shown(console: Console) -> str:
    """Return what the terminal showed last, before the line was taken away."""
    frames = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue()).split("\r")
    return [frame.strip() for frame in frames if frame.strip()][-1]


@pytest.mark.parametrize(
    ("told", "detail"),
    [
        ({"step": 0, "loss": None, "tokens_per_second": 0.0}, ""),
        (
            {"step": 5, "loss": 3.25, "mfu": 0.4321, "seconds_left": 400.0},
            "loss 3.250, 12,345 tokens/s, 43.2% MFU, about 6.7 min left",
        ),
        (
            {"step": 9, "loss": 3.0, "seconds_left": 1.6},
            "loss 3.000, 12,345 tokens/s, about 2 s left",
        ),
        ({"step": 10, "loss": 3.0, "seconds_left": 0.0}, "loss 3.000, 12,345 tokens/s"),
    ],
)
def test_loss_speed_utilisation_and_time_left(told: dict[str, float], detail: str) -> None:
    console = terminal(120)
    with LiveRun(console) as watcher:
        watcher(Progress(**{**VALUES, **told}))
        (task,) = watcher.bar.tasks
        assert (task.completed, task.total) == (told["step"], 10)
    end = f"{told['step']}/10 {detail}".rstrip()
    assert shown(console).endswith(end)
    assert shown(console).startswith("training ━")


def test_a_narrow_terminal_shows_numbers_before_all() -> None:
    for width, text in (
        (80, "training 5/10 loss 3.250, 12,345 tokens/s, 43.2% MFU, about 6.7 min left"),
        (40, "training 5/10 loss 3.250, 12,345 tokens…"),
    ):
        console = terminal(width)
        with LiveRun(console) as watcher:
            watcher(Progress(**VALUES, step=5, loss=3.25, mfu=0.4321, seconds_left=400.0))
        assert shown(console) == text


def test_what_is_no_terminal_gets_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(live.time, "monotonic", lambda: now)
    console = Console(file=io.StringIO(), width=20)
    with LiveRun(console) as watcher:
        watcher(
            Progress(
                **{**VALUES, "phase": "preparing", "tokens_per_second": 0.0}, step=0, loss=None
            )
        )
        for step in range(1, 31):
            now += 1
            watcher(
                Progress(**{**VALUES, "steps": 30}, step=step, loss=3.25, seconds_left=30.0 - step)
            )
    assert console.file.getvalue() == (
        "preparing 0/10\n"
        "training 10/30 loss 3.250, 12,345 tokens/s, about 20 s left\n"
        "training 20/30 loss 3.250, 12,345 tokens/s, about 10 s left\n"
        "training 30/30 loss 3.250, 12,345 tokens/s\n"
    )


def test_a_race_shows_what_a_run_without_a_speed_does() -> None:
    console = terminal(120)
    race = LiveRace(console, runs=2, steps=10)
    for label, step, speed in (("a", 1, 0.0), ("b", 2, 12345.0)):
        task = Task(label, RunConfig())
        race.progress(
            task, Progress(**{**VALUES, "tokens_per_second": speed}, step=step, loss=3.25)
        )
    with console.capture() as capture:
        console.print(race._view())
    rows = [line.split() for line in capture.get().splitlines()]
    assert ["a", "1/10", "3.250", "training"] in rows
    assert ["b", "2/10", "3.250", "12,345"] in rows
