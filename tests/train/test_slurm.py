"""Tasks of srun take their places in a run."""

from __future__ import annotations

import os

import pytest

from steepest.errors import UserError
from steepest.train import Runtime
from steepest.train.processes import Place, check_started, place_of
from steepest.train.slurm import first_host

SLURM = {
    "SLURM_JOB_ID": "1200", "SLURM_STEP_ID": "3", "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "2", "SLURM_PROCID": "3", "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[07-09,12],login",
}  # fmt: skip


@pytest.fixture
def step(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The environment of a task that srun has started with three others on two machines."""
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # so that it is put back as it was
        monkeypatch.delenv(name)
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def test_a_task_of_srun_is_a_process(step: pytest.MonkeyPatch) -> None:
    assert place_of(Runtime()) is None
    names = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    assert [os.environ[name] for name in names] == ["4", "3", "1", "gpu07", "27003"]


def test_a_task_of_srun_on_each_machine_starts_processes(step: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        UserError, match=r"started 4 tasks on 2 machines; with runtime\.processes 8"
    ):
        place_of(Runtime(processes=8))
    step.setenv("SLURM_STEP_NUM_TASKS", "2")
    step.setenv("SLURM_PROCID", "1")
    step.setenv("MASTER_ADDR", "10.0.0.7")
    assert place_of(Runtime(processes=8)) == Place(8, 2, 1, "10.0.0.7:27003")


def test_a_batch_script_is_no_task(step: pytest.MonkeyPatch) -> None:
    step.delenv("SLURM_STEP_NUM_TASKS")  # sbatch sets SLURM_NTASKS and SLURM_PROCID alone
    step.setenv("SLURM_NTASKS", "4")
    assert place_of(Runtime()) is None
    assert "WORLD_SIZE" not in os.environ
    assert place_of(Runtime(processes=2)) == Place(2)
    step.setenv("WORLD_SIZE", "8")
    assert place_of(Runtime(processes=2)) is None
    check_started(Runtime(processes=2))
    step.setenv("WORLD_SIZE", "1")  # as some clusters set for every process
    with pytest.raises(UserError, match=r"asks for 2 processes, but .* is one of 1; unset"):
        check_started(Runtime(processes=2))


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("a", "a"), ("a,b", "a"), ("n1.x.org,b", "n1.x.org"), ("r[1-2]n[03,9]", "r1n03")],
)
def test_the_first_host_of_a_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_no_list_of_hosts() -> None:
    with pytest.raises(UserError, match="is '', which is no list of machines"):
        first_host("")
