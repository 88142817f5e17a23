"""What Slurm's srun tells the tasks that it starts of each other."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from steepest.errors import UserError

FIRST_PORT, PORTS = 15_000, 15_000
"""Ports that runs meet at; below those that systems give to whoever asks for any."""


@dataclass(frozen=True)
class Step:
    """A task's place among those of an srun."""

    tasks: int
    nodes: int
    rank: int
    local_rank: int
    """Number of the task on its machine."""
    host: str
    """The first machine."""
    port: int
    """Where the tasks meet there, by the numbers of job and step."""

    def environment(self) -> dict[str, str]:
        """Return what torchrun would tell a process with this place."""
        return {
            "WORLD_SIZE": str(self.tasks),
            "RANK": str(self.rank),
            "LOCAL_RANK": str(self.local_rank),
            "MASTER_ADDR": self.host,
            "MASTER_PORT": str(self.port),
        }


def step() -> Step | None:
    """Return the place of this process if srun has started it with others.

    None in a batch script, which has the job's variables but not those of a step, and for a task by
    itself. MASTER_ADDR and MASTER_PORT come before what Slurm says.
    """
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) == 1:
        return None
    job, number = int(os.environ["SLURM_JOB_ID"]), int(os.environ["SLURM_STEP_ID"])
    return Step(
        tasks=int(os.environ["SLURM_STEP_NUM_TASKS"]),
        nodes=int(os.environ["SLURM_STEP_NUM_NODES"]),
        rank=int(os.environ["SLURM_PROCID"]),
        local_rank=int(os.environ["SLURM_LOCALID"]),
        host=os.environ.get("MASTER_ADDR") or first_host(os.environ["SLURM_STEP_NODELIST"]),
        port=int(os.environ.get("MASTER_PORT") or FIRST_PORT + (10 * job + number) % PORTS),
    )


def first_host(nodes: str) -> str:
    """Return the first machine of a list as Slurm writes it: "gpu[07-09,12],login" is gpu07.

    Raises UserError for what is no such list.
    """
    found = re.match(r"(?:[^,\[\]\s]|\[\d[\d,-]*\])+", nodes)
    if found is None:
        raise UserError(f"SLURM_STEP_NODELIST is {nodes!r}, which is no list of machines.")
    return re.sub(r"\[(\d+)[\d,-]*\]", r"\1", found[0])
