"""Being asked to stop: a run saves, and a cluster is told to start it again."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
import types
from collections.abc import Iterator
from contextlib import contextmanager

REQUEUE = 75
"""Exit code of a run that saved its state because it was asked to stop: EX_TEMPFAIL, try again."""


class Preempted(Exception):
    """A run was asked to stop, and has saved its state at `step`."""

    def __init__(self, step: int) -> None:
        super().__init__(
            f"Asked to stop: saved after step {step}; the same command continues from there."
        )
        self.step = step


class StopRequest:
    """Whether the process was asked to stop, by SIGTERM or, from Slurm, SIGUSR1."""

    def __init__(self) -> None:
        self.asked = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take signals as requests while the context lasts; only the main thread can.

        Once there was one, or `asked` was set, further ones are ignored for good: the process is
        about to end, and a scheduler that sends them must see its exit code.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = (signal.SIGTERM, signal.SIGUSR1)
        before = {number: signal.signal(number, self._ask) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, signal.SIG_IGN if self.asked else handler)

    def _ask(self, number: int, frame: types.FrameType | None) -> None:
        self.asked = True


def stop_without(parent: int) -> None:
    """Ask this process to stop when its parent has gone, which could not ask: it was killed."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def interrupts_kept() -> Iterator[None]:
    """Let processes that are started in the context not be interrupted by a terminal's Ctrl-C.

    It goes to all processes of a terminal, and what is to be done about it is said once, by this
    one. The block of the signal is inherited; here it is lifted at the end.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def forwarding(children: list[subprocess.Popen[bytes]]) -> Iterator[list[int]]:
    """Pass requests to stop on to processes while the context lasts.

    Ctrl-C becomes SIGTERM, so that they save, and a second one SIGKILL. Yields the signals that
    there were. A process that joins `children` later does not get those before it.
    """
    asked: list[int] = []

    def forward(number: int, frame: types.FrameType | None) -> None:
        if number == signal.SIGINT:
            number = signal.SIGKILL if signal.SIGINT in asked else signal.SIGTERM
            asked.append(signal.SIGINT)
        asked.append(number)
        for child in children:
            child.send_signal(number)

    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = {number: signal.signal(number, forward) for number in numbers}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
