"""How the processes of a run meet, whatever started them, and how they fail as one."""

from __future__ import annotations

import atexit
import itertools
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cache

import torch.distributed as dist
from torch.distributed import Store  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from steepest.errors import UserError
from steepest.train.stopping import REQUEUE, Preempted

LOST = 69
"""Exit code of a process that lost the others, and is not the one whose failure ended the run."""
TIMEOUT = timedelta(minutes=30)
"""How long processes wait for each other: to come, to write a checkpoint, to tokenize a corpus."""

_runs = itertools.count()


def meet() -> Store | None:
    """Return the store that the processes of a group share; None for a process by itself.

    The environment says where it is, as torchrun sets it. Raises UserError if not all come.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None
    return _store(os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", ""))


@cache  # a process may do several runs
def _store(host: str, port: str) -> Store:
    try:
        store: Store = next(rendezvous("env://", timeout=TIMEOUT))[0]
    except (dist.DistError, ValueError) as error:
        raise UserError(
            f"The processes of the run could not meet at {host}:{port} ({first_line(error)})."
        ) from None
    return store


@contextmanager
def one_voice(store: Store | None) -> Iterator[None]:
    """Let one process tell what ends a run that several work on.

    The first that fails raises its error; the others, which mostly fail for want of that one, end
    with SystemExit. If none tells a cause, as where a process was killed, the first one to miss it
    says so. Preempted is raised in process 0 alone.
    """
    if store is None:
        yield
        return
    key = f"steepest/failures/{next(_runs)}"
    try:
        yield
    except Preempted:
        if int(os.environ["RANK"]) > 0:
            sys.exit(REQUEUE)
        raise
    except (Exception, KeyboardInterrupt) as error:
        atexit.unregister(dist.destroy_process_group)  # it would wait for what never comes
        first = lost = _is_loss(error)
        with suppress(dist.DistError):  # the store may have gone, with the process that held it
            first = store.add(key, 1) == 1
        if first and not lost:
            raise
        if first:
            print(
                f"steepest: process {os.environ['RANK']} lost the others of the run: {error}",
                file=sys.stderr,
            )
        sys.exit(_code(error))


def _is_loss(error: BaseException) -> bool:
    """Return whether an error is that another process has gone or does not answer."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "gloo/transport" in str(error)
    )


def _code(error: BaseException) -> int:
    if isinstance(error, KeyboardInterrupt):
        return 130
    return 2 if isinstance(error, UserError) else LOST


def first_line(error: BaseException) -> str:
    """Return what an error says in one line."""
    return next(iter(str(error).splitlines()), type(error).__name__)
