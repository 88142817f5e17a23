"""Runs side by side on one machine: processes of their own, one torch thread each."""

from __future__ import annotations

import multiprocessing
import os
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steepest.errors import UserError
from steepest.train import Progress, RunConfig, Runtime
from steepest.train import run as train_run
from steepest.train.stopping import interrupts_kept

WORKER_ENVIRONMENT = {
    # One thread a run: runs that share cores with spinning threads slow each other manyfold.
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "passive",
    # Keep freed memory: giving it back and faulting it in again costs up to a tenth of a step.
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 32),
    # A run is a worker's own, whatever group of processes the race is started in.
    "WORLD_SIZE": "1",
}
"""Set before a worker starts, because its libraries read these once."""

POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Task:
    """A run to do, with a label for whoever watches."""

    label: str
    config: RunConfig


@dataclass(frozen=True)
class Outcome:
    """A run that is done."""

    task: Task
    result: dict[str, Any]


OnProgress = Callable[[Task, Progress], None]


class LocalExecutor:
    """A pool of worker processes. Workers live across runs, so they import and compile once."""

    def __init__(self, jobs: int, runs_dir: Path, on_progress: OnProgress) -> None:
        self.runs_dir, self.on_progress = runs_dir, on_progress
        self.context = multiprocessing.get_context("spawn")
        self.messages: Any = self.context.Queue()
        self.tasks: dict[int, Task] = {}
        self.pending: dict[Future[dict[str, Any]], Task] = {}
        with _environment(WORKER_ENVIRONMENT):
            self.pool = ProcessPoolExecutor(
                jobs, self.context, initializer=_start, initargs=(self.messages,)
            )
            # Workers are started by the first submissions, which must see the environment.
            with interrupts_kept():
                starting = [self.pool.submit(os.getpid) for _ in range(jobs)]
        try:
            wait(starting)
        except KeyboardInterrupt:
            self._kill()
            raise
        for started in starting:
            started.result()

    def submit(self, task: Task) -> None:
        """Queue a run."""
        number = len(self.tasks)
        self.tasks[number] = task
        try:
            future = self.pool.submit(_work, number, task.config, self.runs_dir)
        except BrokenProcessPool:
            raise self._killed() from None
        self.pending[future] = task

    def outcomes(self) -> Iterator[Outcome]:
        """Yield runs as they end, until none is left; runs may be submitted meanwhile.

        Raises UserError if a run cannot work, or if a process was killed.
        """
        while self.pending:
            done, _ = wait(self.pending, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED)
            self._pass_on()
            for future in done:
                try:
                    result = future.result()
                except BrokenProcessPool:
                    raise self._killed() from None
                except UserError:
                    raise
                except Exception as error:
                    label, kind = self.pending[future].label, type(error).__name__
                    raise UserError(f"The run {label} failed with {kind}: {error}") from error
                yield Outcome(self.pending.pop(future), result)

    def _killed(self) -> UserError:
        begun = ", ".join(task.label for future, task in self.pending.items() if future.running())
        return UserError(
            f"A worker process was killed, perhaps for want of memory, while these were under way: "
            f"{begun or 'none'}; run the same command again to continue from the last checkpoints."
        )

    def close(self) -> None:
        """Stop the workers, at once if runs are under way."""
        if self.pending:
            self._kill()
        self.pool.shutdown(wait=True, cancel_futures=True)

    def _kill(self) -> None:
        for process in list((self.pool._processes or {}).values()):
            process.kill()

    def _pass_on(self) -> None:
        while True:
            try:
                number, progress = self.messages.get_nowait()
            except queue.Empty:
                return
            self.on_progress(self.tasks[number], progress)


_messages: Any = None


def _start(messages: Any) -> None:
    global _messages  # noqa: PLW0603 - how a pool's initializer hands over a queue
    _messages = messages
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this worker when the race is killed, which would otherwise leave it training alone."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(number: int, config: RunConfig, runs_dir: Path) -> dict[str, Any]:
    def tell(progress: Progress) -> None:
        _messages.put((number, progress))

    return train_run(config, runs_dir, runtime=Runtime(threads=1), on_progress=tell)


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
