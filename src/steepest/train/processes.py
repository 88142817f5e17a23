"""The processes of a run, started here on one machine or on each of several, and not by torchrun.

torchrun ends with 1 whatever its processes end with, and kills them 30 seconds after it was asked
to stop; a scheduler must learn that the run wants to be started again, and saving takes its time.
"""

from __future__ import annotations

import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]

from steepest.cores import cores
from steepest.errors import UserError
from steepest.train import slurm
from steepest.train.config import Runtime
from steepest.train.group import LOST, POLL_SECONDS, TIMEOUT, first_line
from steepest.train.stopping import REQUEUE, forwarding, interrupts_kept

LAUNCHER = "STEEPEST_LAUNCHER"
"""Environment variable with the process id of what has started a process."""
GRACE_SECONDS = 10
"""How long processes may go on after one of them failed."""


def place_of(runtime: Runtime) -> Place | None:
    """Return the processes that are to be started for a run, by this one on its machine.

    None for a process that trains: by itself, or as one of those that torchrun or srun started,
    whose place is then in the environment: srun's is put there as torchrun would. Raises UserError
    where srun and runtime don't fit.
    """
    if "WORLD_SIZE" in os.environ:
        return None
    if (step := slurm.step()) is not None:
        if runtime.processes == 1:
            os.environ.update(step.environment())
            return None
        if step.tasks != step.nodes:
            raise UserError(
                f"srun has started {step.tasks} tasks on {step.nodes} machines; with "
                f"runtime.processes {runtime.processes} it must start one on each "
                "(--ntasks-per-node 1), or without it one for each GPU."
            )
        return Place(runtime.processes, step.tasks, step.rank, f"{step.host}:{step.port}")
    if runtime.processes * runtime.nodes == 1:
        return None
    if runtime.nodes == 1:
        return Place(runtime.processes)
    return Place(runtime.processes, runtime.nodes, runtime.node_rank, runtime.rendezvous)


def check_started(runtime: Runtime) -> None:
    """Raise UserError where this process was started by others, with fewer than runtime says."""
    asked, count = runtime.processes * runtime.nodes, int(os.environ.get("WORLD_SIZE") or "1")
    if asked > count:
        raise UserError(
            f"runtime asks for {asked} processes, but WORLD_SIZE in the environment says that this "
            f"is one of {count}; unset it, or leave out runtime.processes and runtime.nodes."
        )


@dataclass(frozen=True)
class Place:
    """How many processes a run has, and which of them are started here."""

    processes: int
    """On each machine."""
    nodes: int = 1
    """Machines."""
    node_rank: int = 0
    """Number of this one, from 0."""
    rendezvous: str = "127.0.0.1:0"
    """host:port of machine 0, where all meet; port 0 is a free one, for a machine by itself."""

    @property
    def world_size(self) -> int:
        """Processes on all machines."""
        return self.processes * self.nodes


def run_together(command: Sequence[str], place: Place) -> int:
    """Run a command in processes that form a group of torch.distributed; return its exit code.

    Each gets the environment that torchrun would give it, LAUNCHER, and its share of this machine's
    cores unless OMP_NUM_THREADS says otherwise. SIGTERM and SIGUSR1 are passed on to all, and
    Ctrl-C asks them to stop, too; a second one kills them. The code is 0 if all end so,
    `stopping.REQUEUE` if they were asked to stop and nothing else went wrong, or else that of the
    first that failed, after which the others are ended. It is the same on all machines, but for
    Ctrl-C: 130 here.

    Raises UserError where the machines do not meet.
    """
    children: list[subprocess.Popen[bytes]] = []
    with forwarding(children) as asked:
        if (meeting := _Meeting.begin(place, asked)) is None:
            return REQUEUE
        environment = _environment(place, meeting.store)
        with interrupts_kept():
            for local in range(place.processes):
                rank = place.node_rank * place.processes + local
                own = {**environment, "RANK": str(rank), "LOCAL_RANK": str(local)}
                children.append(subprocess.Popen(command, env=own))
                for number in asked:
                    children[-1].send_signal(number)
        code = _ended(children, meeting, asked)
        meeting.end()
    return 130 if signal.SIGINT in asked else code


def _environment(place: Place, store: TCPStore) -> dict[str, str]:
    return {
        "OMP_NUM_THREADS": str(max(1, cores() // place.processes)),
        **os.environ,
        "MASTER_ADDR": store.host,
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store that machine 0 has opened
        "TORCHELASTIC_RESTART_COUNT": "0",
        "WORLD_SIZE": str(place.world_size),
        "LOCAL_WORLD_SIZE": str(place.processes),
        LAUNCHER: str(os.getpid()),
    }


class _Meeting:
    """What the machines of a run tell each other, in the store that machine 0 holds."""

    def __init__(self, place: Place, store: TCPStore) -> None:
        self.place, self.store = place, store

    @classmethod
    def begin(cls, place: Place, asked: list[int]) -> _Meeting | None:
        """Wait until all machines are there; None if this one is asked to stop before.

        Raises UserError if they do not come in time or do not fit together.
        """
        host, _, port = place.rendezvous.rpartition(":")
        try:
            if place.node_rank > 0 and not _reachable(host, int(port), asked):
                return None
            store = TCPStore(
                host, int(port), is_master=place.node_rank == 0, wait_for_workers=False
            )
        except (DistError, ValueError) as error:
            raise UserError(
                f"The machines of the run cannot meet at {place.rendezvous} ({first_line(error)})."
            ) from None
        meeting = cls(place, store)
        if store.add(f"machine/{place.node_rank}", place.processes) != place.processes:
            raise UserError(f"Two machines have runtime.node_rank {place.node_rank}.")
        return meeting if meeting._all_came(asked) else None

    def _all_came(self, asked: list[int]) -> bool:
        deadline = time.monotonic() + TIMEOUT.total_seconds()
        for rank in range(self.place.nodes):
            if not self.store.check([f"machine/{rank}"]):
                _say(f"waiting for machine {rank} to come to {self.place.rendezvous}.")
            while not self.store.check([f"machine/{rank}"]):
                _check_time(deadline, f"Machine {rank} of the run did not come")
                if asked:
                    return False
                time.sleep(POLL_SECONDS)
            if (count := self.store.add(f"machine/{rank}", 0)) != self.place.processes:
                raise UserError(
                    f"Machine {rank} has {count} processes and machine {self.place.node_rank} has "
                    f"{self.place.processes}; runtime.processes must be the same on all."
                )
        return True

    def tell(self, code: int) -> int:
        """Let a failure end the run on all machines; return the code of the one told first."""
        try:
            return int(self.store.compare_set("failure", "", str(code)))
        except DistError:
            return code

    def told(self) -> int | None:
        """Return the code of the failure that ends the run, if there is one."""
        if self.place.nodes == 1:
            return None
        try:
            return int(self.store.get("failure")) if self.store.check(["failure"]) else None
        except DistError:  # machine 0 has gone
            return LOST

    def end(self) -> None:
        """Tell that all is over here; machine 0 holds the store until all have, or a while."""
        deadline = time.monotonic() + 2 * GRACE_SECONDS
        try:
            self.store.set(f"over/{self.place.node_rank}", "")
            over = [f"over/{rank}" for rank in range(self.place.nodes)]
            while self.place.node_rank == 0 and not self.store.check(over):
                if time.monotonic() > deadline:
                    return
                time.sleep(POLL_SECONDS)
        except DistError:
            return


def _reachable(host: str, port: int, asked: list[int]) -> bool:
    """Wait until somebody listens there; False if this process is asked to stop before."""
    deadline, waits = time.monotonic() + TIMEOUT.total_seconds(), False
    while not asked:
        try:
            socket.create_connection((host, port), timeout=1).close()
        except OSError:
            if not waits:
                _say(f"waiting for machine 0 to answer at {host}:{port}.")
            waits = True
            _check_time(deadline, f"Machine 0 of the run does not answer at {host}:{port}")
            time.sleep(POLL_SECONDS)
        else:
            return True
    return False


def _check_time(deadline: float, what: str) -> None:
    if time.monotonic() > deadline:
        raise UserError(f"{what} within {TIMEOUT.total_seconds() / 60:.0f} minutes.")


def _ended(children: list[subprocess.Popen[bytes]], meeting: _Meeting, asked: list[int]) -> int:
    """Wait for all processes; once one fails, here or elsewhere, end the others; return the code.

    Those that only lost the others tell last.
    """
    failure, deadline = None, math.inf
    while True:
        codes = [child.poll() for child in children]
        late = time.monotonic() > deadline
        if failure in (None, LOST) and not late:
            found = meeting.told() or _failure(codes, asked)
            if found not in (None, LOST):
                _tell_kills(codes, asked, meeting.place)
                found = meeting.tell(found)
                if meeting.place.nodes > 1 and found != REQUEUE:
                    _say(f"a process has failed, and says why where it is; the code is {found}.")
                _signal(children, signal.SIGTERM)
            failure = found or failure
            if failure is not None:
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        if None not in codes and (failure != LOST or late or meeting.place.nodes == 1):
            break
        if late:
            _signal(children, signal.SIGKILL)
        time.sleep(POLL_SECONDS)
    if failure is None:
        return max(code for code in codes if code is not None)
    return meeting.tell(failure)


def _failure(codes: list[int | None], asked: list[int]) -> int | None:
    """Return what the codes of processes, None where one goes on, say of a failure, if there is.

    `asked` are the signals that were passed on. A process that one of them ended did not listen
    yet: it has not trained, but holds up the others.
    """
    done = [code for code in codes if code not in (None, 0, REQUEUE, LOST)]
    if causes := [code for code in done if -code not in asked]:
        return causes[0] if causes[0] > 0 else 128 - causes[0]
    if done:
        return REQUEUE
    return LOST if LOST in codes else None


def _tell_kills(codes: list[int | None], asked: list[int], place: Place) -> None:
    """Say which processes were killed, as where memory is short: they could not say it."""
    for local, code in enumerate(codes):
        if code is not None and code < 0 and -code not in asked:
            rank = place.node_rank * place.processes + local
            name = signal.Signals(-code).name
            _say(f"process {rank} was killed by {name}.")


def _say(sentence: str) -> None:
    print(f"steepest: {sentence}", file=sys.stderr)


def _signal(children: list[subprocess.Popen[bytes]], number: int) -> None:
    for child in children:
        child.send_signal(number)  # nothing where it has ended
