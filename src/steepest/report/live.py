"""A race while it runs: what is under way, how far, how long still."""

from __future__ import annotations

import math
import time
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from steepest.report import formatting
from steepest.study.executor import Task
from steepest.train import Progress as RunProgress

LINE_SECONDS = 10.0
"""Least time between two lines on a run, where the output is not a terminal."""
WIDTH_OF_A_BAR = 110
"""Columns that a terminal needs to have a bar beside the numbers."""


class LiveRace:
    """Shows a race in the terminal, and prints a line for every run that ends.

    Where the output is not a terminal, only those lines are printed.
    """

    def __init__(self, console: Console, *, runs: int, steps: int) -> None:
        self.console, self.runs, self.steps = console, runs, steps
        self.started = time.monotonic()
        self.done = self.reused = 0
        self.seen: set[str] = set()
        self.running: dict[str, tuple[Task, RunProgress]] = {}
        self.bar = Progress(
            TextColumn("runs"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[left]}")
        )
        self.task = self.bar.add_task("runs", total=runs, left="")
        self.live = Live(self._view(), console=console, refresh_per_second=4, transient=True)

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.console.is_terminal:
            self.live.stop()

    def progress(self, task: Task, progress: RunProgress) -> None:
        """Show how far a run is."""
        if progress.phase == "done":
            self.running.pop(task.label, None)
        else:
            self.running[task.label] = (task, progress)
        self.seen.add(task.label)
        self._refresh()

    def finished(self, task: Task, result: dict[str, Any]) -> None:
        """Print how a run ended."""
        self.running.pop(task.label, None)
        self.done += 1
        self.reused += task.label not in self.seen
        end = (
            f"diverged: {result['reason']}"
            if result["status"] == "diverged"
            else f"loss {result['val_loss']:.4f}  {result['tokens_per_second'] / 1e3:.0f}k tokens/s"
        )
        left = self._left()
        self.console.print(
            f"[{self.done:>{len(str(self.runs))}}/{self.runs}] {task.label}: {end}"
            + ("" if self.console.is_terminal or not left else f"  ({left})"),
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
        self._refresh()

    def _left(self) -> str:
        """Return the time left, by the pace of the runs that were not there already."""
        steps = (self.done - self.reused) * self.steps
        steps += sum(p.step for _, p in self.running.values())
        total = (self.runs - self.reused) * self.steps
        if not steps or steps >= total:
            return ""
        elapsed = time.monotonic() - self.started
        return f"about {formatting.duration(round(elapsed / steps * (total - steps)))} left"

    def _refresh(self) -> None:
        self.bar.update(self.task, completed=self.done, left=self._left())
        self.live.update(self._view())

    def _view(self) -> Group:
        table = Table("run", "step", "loss", "tokens/s", box=None, pad_edge=False)
        for label, (_, progress) in sorted(self.running.items()):
            table.add_row(
                label,
                f"{progress.step}/{progress.steps}",
                "" if progress.loss is None else f"{progress.loss:.3f}",
                _speed(progress) if progress.tokens_per_second else progress.phase,
            )
        return Group(table, self.bar)


class LiveRun:
    """Shows a single run in the terminal; elsewhere, a line every now and then.

    A narrow terminal gets the numbers without the bar.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.printed = -math.inf
        columns = ["{task.description}", "{task.fields[place]} {task.fields[detail]}"]
        self.bar = Progress(
            *(
                [TextColumn(columns[0]), BarColumn(), TextColumn(columns[1])]
                if console.width >= WIDTH_OF_A_BAR
                else [TextColumn(" ".join(columns))]  # cut at its end, where columns all shrink
            ),
            console=console,
            transient=True,
        )
        self.task = self.bar.add_task("preparing", total=None, place="", detail="")

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.console.is_terminal:
            self.bar.stop()

    def __call__(self, progress: RunProgress) -> None:
        """Show how far the run is."""
        place, detail = f"{progress.step}/{progress.steps}", _detail(progress)
        if self.console.is_terminal:
            self.bar.update(
                self.task,
                description=progress.phase,
                total=progress.steps,
                completed=progress.step,
                place=place,
                detail=detail,
            )
        elif time.monotonic() - self.printed >= LINE_SECONDS:
            self.printed = time.monotonic()
            line = f"{progress.phase} {place} {detail}".rstrip()
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)


def _detail(progress: RunProgress) -> str:
    """Return loss, speed and time left, as far as there are any."""
    left = progress.seconds_left
    parts = (
        None if progress.loss is None else f"loss {progress.loss:.3f}",
        f"{_speed(progress)} tokens/s" if progress.tokens_per_second else None,
        None if progress.mfu is None else f"{progress.mfu:.1%} MFU",
        None
        if left is None or progress.step >= progress.steps
        else f"about {formatting.duration(left) if left >= 120 else f'{left:.0f} s'} left",
    )
    return ", ".join(part for part in parts if part is not None)


def _speed(progress: RunProgress) -> str:
    return f"{progress.tokens_per_second:,.0f}"
