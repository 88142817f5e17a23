"""How the processes of a run meet, whatever started them, and how they fail as one."""

from __future__ import annotations

import atexit
import itertools
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache

import torch.distributed as dist
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from steepest.errors import UserError
from steepest.train.stopping import Preempted

LOST = 69
"""Exit code of a process that lost the others, and is not the one whose failure ended the run."""
TIMEOUT = timedelta(minutes=30)
"""How long processes wait for each other: to come, to write a checkpoint, to tokenize a corpus."""
POLL_SECONDS = 0.1

_meetings = itertools.count()


class FailedElsewhere(Exception):
    """A run has ended because another of its processes failed, which says why."""

    def __init__(self, sentence: str, code: int, *, untold: bool = False) -> None:
        super().__init__(sentence)
        self.code = code
        """What a command should exit with."""
        self.untold = untold
        """Whether no process could say why, as where one was killed: then this one should."""


def meet() -> Store | None:
    """Return a store that the processes of a group share; None for a process by itself.

    The environment says where the group is, as torchrun sets it. All processes must meet equally
    often: what one meeting leaves in its store, another does not see.

    Raises UserError if not all come.
    """
    count = os.environ.get("WORLD_SIZE") or "1"
    if not count.isdecimal():
        raise UserError(f"WORLD_SIZE is {count!r} in the environment, not a number of processes.")
    if int(count) == 1:
        return None
    store = _store(os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", ""))
    return PrefixStore(f"steepest/{next(_meetings)}", store)


@cache  # a process may do several runs, in one group
def _store(host: str, port: str) -> Store:
    try:
        store: Store = next(rendezvous("env://", timeout=TIMEOUT))[0]
    except (dist.DistError, ValueError) as error:
        raise UserError(
            f"The processes of the run could not meet at {host}:{port} ({first_line(error)})."
        ) from None
    return store


def wait_for_all(store: Store) -> None:
    """Wait until all processes of a meeting have come to this line, which they do once.

    Until they are connected, this is how they learn that one does not come.

    Raises FailedElsewhere if one has failed in `one_voice`, and UserError after half an hour.
    """
    count, deadline = int(os.environ["WORLD_SIZE"]), time.monotonic() + TIMEOUT.total_seconds()
    came = store.add("came", 1)
    while came < count:
        if store.check(["failures"]):
            raise FailedElsewhere("Another process of the run failed, and says why.", LOST)
        if time.monotonic() > deadline:
            raise UserError(
                f"Only {came} of the run's {count} processes are ready after "
                f"{TIMEOUT.total_seconds() / 60:.0f} minutes."
            )
        time.sleep(POLL_SECONDS)
        came = store.add("came", 0)


@contextmanager
def one_voice(store: Store | None) -> Iterator[None]:
    """Let one process raise what ends the work that those of a meeting do together.

    The first that fails raises its error; the others, which mostly fail for want of that one, raise
    FailedElsewhere. Preempted and KeyboardInterrupt, which are no failures, are raised in all.
    """
    try:
        yield
    except (Preempted, FailedElsewhere):
        raise
    except (Exception, KeyboardInterrupt) as error:
        if store is None:
            raise
        atexit.unregister(dist.destroy_process_group)  # it would wait for what never comes
        lost = _is_loss(error)
        first = _is_first(store, lost)
        if isinstance(error, KeyboardInterrupt) or (first and not lost):
            raise
        how = "lost the others of the run" if lost else "failed as another one of the run did"
        raise FailedElsewhere(
            f"process {os.environ['RANK']} {how}: {error}",
            2 if isinstance(error, UserError) else LOST,
            untold=first,
        ) from error


def _is_first(store: Store, lost: bool) -> bool:
    """Return whether a process is the first to fail, or to lose the others before one failed."""
    try:
        if lost:
            return store.add("losses", 1) == 1 and not store.check(["failures"])
        return store.add("failures", 1) == 1
    except dist.DistError:  # the store has gone, with the process that held it
        return lost


def _is_loss(error: BaseException) -> bool:
    """Return whether an error is that another process has gone or does not answer."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "gloo/transport" in str(error)
    )


def first_line(error: BaseException) -> str:
    """Return what an error says in one line."""
    return next(iter(str(error).splitlines()), type(error).__name__)
