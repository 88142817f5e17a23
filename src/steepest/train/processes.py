"""The processes of a run on one machine, started here and not by torchrun.

torchrun ends with 1 whatever its processes end with, and kills them 30 seconds after it was asked
to stop; a scheduler must learn that the run wants to be started again, and saving takes its time.
"""

from __future__ import annotations

import math
import os
import signal
import subprocess
import time
from collections.abc import Sequence

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from steepest.train.stopping import REQUEUE, forwarding

HOST = "127.0.0.1"
POLL_SECONDS = 0.1
GRACE_SECONDS = 10
"""How long processes may go on after one of them failed."""


def run_together(command: Sequence[str], count: int) -> int:
    """Run a command in `count` processes that form a group of torch.distributed; return its code.

    Each gets the environment that torchrun would give it, and its share of this machine's cores
    unless OMP_NUM_THREADS says otherwise. SIGTERM, SIGUSR1 and SIGINT are passed on to all. The
    code is 0 if all end so, `stopping.REQUEUE` if they were asked to stop and nothing else went
    wrong, or else that of the first that failed, after which the others are ended.
    """
    store = TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
    shared = {
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // count)),
        **os.environ,
        "MASTER_ADDR": HOST,
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store that this process has opened
        "TORCHELASTIC_RESTART_COUNT": "0",
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
    }
    children: list[subprocess.Popen[bytes]] = []
    with forwarding(children) as asked:
        for rank in range(count):
            own = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            children.append(subprocess.Popen(command, env=own))
            for number in asked:
                children[-1].send_signal(number)
        failure = _first_failure(children)
    if failure in [-number for number in asked]:
        return REQUEUE  # one that did not listen yet: it has not trained, and held up the others
    if failure is not None:
        return failure if failure > 0 else 128 - failure
    return max(child.returncode for child in children)


def _first_failure(children: list[subprocess.Popen[bytes]]) -> int | None:
    """Wait for all processes; once one fails, end the others and return its code."""
    failure, deadline = None, math.inf
    while any(child.poll() is None for child in children):
        time.sleep(POLL_SECONDS)
        if failure is None and (failure := _failed(children)) is not None:
            deadline = time.monotonic() + GRACE_SECONDS
            _signal(children, signal.SIGTERM)
        if time.monotonic() > deadline:
            _signal(children, signal.SIGKILL)
    return _failed(children) if failure is None else failure


def _failed(children: list[subprocess.Popen[bytes]]) -> int | None:
    codes = (child.poll() for child in children)
    return next((code for code in codes if code not in (None, 0, REQUEUE)), None)


def _signal(children: list[subprocess.Popen[bytes]], number: int) -> None:
    for child in children:
        child.send_signal(number)  # nothing where it has ended
