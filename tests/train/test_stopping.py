"""The command, asked to stop: it saves, says so by its exit code, and continues."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from steepest.cli.train import train_one
from steepest.errors import UserError
from steepest.train import REQUEUE, RunConfig, Runtime, checkpoints, read_metrics, run
from steepest.train.group import LOST
from steepest.train.processes import Place, check_started, place_of, run_together
from steepest.train.slurm import first_host

from .conftest import MakeConfig
from .test_parallel import free_port, steps_begun
from .test_resume import assert_same_run

STEPS = 60
SLOW = """
import time
from torch.optim import AdamW


class Slow(AdamW):
    def step(self):
        super().step()
        time.sleep(0.05)
"""

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(scope="module")
def config(make_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run that takes seconds, so that it can be stopped within."""
    file = tmp_path_factory.mktemp("slow") / "slow.py"
    file.write_text(SLOW)
    return make_config(name=f"{file}:Slow", steps=STEPS, every=STEPS)


@pytest.fixture(scope="module")
def whole(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the run, done without interruption."""
    runs = tmp_path_factory.mktemp("whole")
    return runs / str(run(config, runs, runtime=Runtime(threads=1, log_every=1))["hash"])


@pytest.fixture
def start(config: RunConfig, tmp_path: Path, child_environment: dict[str, str]) -> Start:
    """Return a function that starts the command."""
    file = tmp_path / "run.toml"
    file.write_text(config.to_toml())

    def start(*arguments: str, **how: Any) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "steepest", "train", *arguments]
        command += ["--runtime.threads", "1", "--runtime.log-every", "1"]
        return subprocess.Popen(
            command, env={**child_environment, "GLOO_SOCKET_IFNAME": "lo"},
            text=True, stderr=subprocess.PIPE, stdout=subprocess.PIPE, **how,
        )  # fmt: skip

    return start


def wait_for_step(process: subprocess.Popen[str], folder: Path, step: int) -> None:
    deadline = time.monotonic() + 300
    while len(read_metrics(folder / "metrics.jsonl")) <= step:
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def stop(process: subprocess.Popen[str], number: int, folder: Path, step: int) -> int:
    """Ask a process to stop once the run has done a step; return the last step that it did."""
    wait_for_step(process, folder, step)
    process.send_signal(number)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == REQUEUE, (output, errors)
    last: int = read_metrics(folder / "metrics.jsonl")[-1]["step"]
    assert errors.count(f"saved after step {last}; the same command continues") == 1
    assert not (folder / "result.json").exists()
    return last


@pytest.mark.slow
def test_a_stopped_command_continues_to_the_same_bits(
    start: Start, whole: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "runs" / whole.name
    again = (str(tmp_path / "run.toml"), "--out", str(tmp_path / "runs"))
    first = stop(start(*again), signal.SIGTERM, folder, 5)
    second = stop(start(*again), signal.SIGUSR1, folder, first + 5)
    assert 5 <= first < second < STEPS
    train_one([*again, "--runtime.threads", "1", "--runtime.log-every", "1"])
    assert_same_run(folder, whole)


@pytest.mark.slow
def test_several_processes_stop_together(
    start: Start, config: RunConfig, whole: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "runs" / whole.name
    command = [str(tmp_path / "run.toml"), "--out", str(tmp_path / "runs")]
    stop(start(*command, "--runtime.processes", "2"), signal.SIGTERM, folder, 5)
    run(config, folder.parent, runtime=Runtime(threads=1, log_every=1))
    losses = [
        [record.get("loss", record.get("val_loss")) for record in read_metrics(f / "metrics.jsonl")]
        for f in (folder, whole)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.slow
def test_processes_of_torchrun_save_when_it_is_told_to_end(
    start: Start, whole: Path, tmp_path: Path, child_environment: dict[str, str]
) -> None:
    """`start` has written the config; torchrun's own exit code is 1, whatever its processes' is."""
    folder = tmp_path / "runs" / whole.name
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    command += ["-m", "steepest", "train", str(tmp_path / "run.toml"), "--out", str(folder.parent)]
    command += ["--runtime.threads", "1", "--runtime.log-every", "1"]

    def torchrun() -> subprocess.Popen[str]:
        return subprocess.Popen(
            command, env={**child_environment, "GLOO_SOCKET_IFNAME": "lo"},
            text=True, stderr=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    process = torchrun()
    wait_for_step(process, folder, 5)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=300)
    last = read_metrics(folder / "metrics.jsonl")[-1]["step"]
    assert 5 <= last < STEPS
    assert errors.count(f"saved after step {last}; the same command continues") == 1
    assert process.returncode != 0, (output, errors)
    descendants_are_gone(folder)
    newest = checkpoints.newest(folder / "checkpoints")
    assert newest is not None
    assert checkpoints.load(newest)["step"] == last
    process = torchrun()
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, (output, errors)
    assert steps_begun(folder) == [0, last]
    both = [
        [record.get("loss", record.get("val_loss")) for record in read_metrics(f / "metrics.jsonl")]
        for f in (folder, whole)
    ]
    assert both[0] == pytest.approx(both[1], rel=1e-4)


def descendants_are_gone(folder: Path) -> None:
    """Check that no process works on the run any more."""
    with (folder / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.slow
def test_ctrl_c_saves_and_is_answered_once(start: Start, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / whole.name
    command = [str(tmp_path / "run.toml"), "--out", str(tmp_path / "runs")]
    process = start(*command, "--runtime.processes", "2", start_new_session=True)
    wait_for_step(process, folder, 5)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all processes
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 130
    assert errors.count("saved after step") == 1
    assert "Traceback" not in errors
    descendants_are_gone(folder)


@pytest.mark.slow
def test_a_killed_command_leaves_no_processes(start: Start, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / whole.name
    command = [str(tmp_path / "run.toml"), "--out", str(tmp_path / "runs")]
    process = start(*command, "--runtime.processes", "2")
    wait_for_step(process, folder, 5)
    process.kill()
    _, errors = process.communicate(timeout=60)  # until nobody holds the other ends
    descendants_are_gone(folder)
    last = read_metrics(folder / "metrics.jsonl")[-1]["step"]
    assert last < STEPS
    assert errors.count(f"saved after step {last};") == 1


FAILS = """
import os, signal
from torch.optim import AdamW


class {name}(AdamW):
    steps = 0

    def step(self):
        super().step()
        self.steps += 1
        if self.steps == 3 and os.environ["RANK"] == "1":
            {ending}
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "failure",
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", 137, "process 1 was killed by SIGKILL."),
        ("raise ArithmeticError('of my own')", 1, "ArithmeticError: of my own"),
        ("from steepest.errors import UserError; raise UserError('No.')", 2, "steepest: No."),
    ],
)
def test_a_process_that_fails_ends_all_and_is_told_of_once(
    failure: tuple[str, int, str], start: Start, make_config: MakeConfig, tmp_path: Path
) -> None:
    ending, code, sentence = failure
    file = tmp_path / "fails.py"
    file.write_text(FAILS.format(name="Fails", ending=ending))
    config = tmp_path / "fails.toml"
    config.write_text(make_config(name=f"{file}:Fails", steps=STEPS, every=STEPS).to_toml())
    runs = tmp_path / "runs"
    process = start(str(config), "--out", str(runs), "--runtime.processes", "2")
    _, errors = process.communicate(timeout=300)
    assert process.returncode == code, errors
    assert errors.count(sentence) == 1
    assert errors.count("Traceback (most recent call last)") == (code == 1)
    assert "gloo" not in errors or code == 137
    (folder,) = runs.iterdir()
    descendants_are_gone(folder)


ENDS = """
import os, signal, sys, time
rank, world = os.environ["RANK"], os.environ["WORLD_SIZE"]
ending = sys.argv[1 + int(rank)]
if ending == "listens":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
if ending in ("listens", "starts"):
    open(os.path.join(sys.argv[-1], rank), "w").close()
    time.sleep(60)
if ending == "killed":
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(int(ending))
"""


@pytest.mark.parametrize(
    ("endings", "code"),
    [
        (("0", "0"), 0),
        (("0", "3"), 3),
        (("75", "75"), REQUEUE),
        (("3", "listens"), 3),
        (("69", "killed"), 137),
        (("69", "69"), LOST),
    ],
)
def test_the_code_of_several_processes(
    endings: tuple[str, ...], code: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    command = [sys.executable, "-c", ENDS, *endings, str(tmp_path)]
    assert run_together(command, Place(len(endings))) == code
    assert capfd.readouterr().err.count("process 1 was killed by SIGKILL") == (code == 137)


def ask_when_both_are_there(folder: Path, asked: int) -> None:
    while len(list(folder.iterdir())) < 2:
        time.sleep(0.02)
    os.kill(asked, signal.SIGTERM)


def test_a_process_that_did_not_listen_yet_is_no_failure(tmp_path: Path) -> None:
    asking = threading.Thread(target=ask_when_both_are_there, args=(tmp_path, os.getpid()))
    asking.start()
    command = [sys.executable, "-c", ENDS, "listens", "starts", str(tmp_path)]
    assert run_together(command, Place(2)) == REQUEUE
    asking.join()


def start_machine(command: list[str], place: Place) -> None:
    """Be the process that starts those of one machine."""
    try:
        sys.exit(run_together(command, place))
    except UserError as error:
        Path(command[-1], f"error {place.node_rank}").write_text(str(error))
        sys.exit(2)


def two_machines(*endings: str, folder: Path, processes: tuple[int, int] = (1, 1)) -> list[Any]:
    """Return two processes that have started one or more each, as two machines would."""
    command = [sys.executable, "-c", ENDS, *endings, str(folder)]
    meeting = f"127.0.0.1:{free_port()}"
    forking = multiprocessing.get_context("fork")
    both = [
        forking.Process(target=start_machine, args=(command, Place(count, 2, rank, meeting)))
        for rank, count in enumerate(processes)
    ]
    for process in both:
        process.start()
    return both


@pytest.mark.parametrize(
    ("endings", "code"),
    [
        (("0", "0"), 0),
        (("75", "75"), REQUEUE),
        (("listens", "3"), 3),
        (("3", "listens"), 3),
        (("69", "killed"), 137),
        (("killed", "69"), 137),
    ],
)
def test_machines_end_with_the_same_code(
    endings: tuple[str, ...], code: int, tmp_path: Path
) -> None:
    both = two_machines(*endings, folder=tmp_path)
    for process in both:
        process.join(60)
    assert [process.exitcode for process in both] == [code, code]


def test_a_request_to_one_machine_ends_both(tmp_path: Path) -> None:
    both = two_machines("listens", "starts", folder=tmp_path)
    ask_when_both_are_there(tmp_path, both[1].pid)
    for process in both:
        process.join(60)
    assert [process.exitcode for process in both] == [REQUEUE, REQUEUE]


def test_machines_must_have_as_many_processes_each(tmp_path: Path) -> None:
    both = two_machines("0", "0", "0", folder=tmp_path, processes=(1, 2))
    for process in both:
        process.join(60)
    assert [process.exitcode for process in both] == [2, 2]
    assert "Machine 1 has 2 processes and machine 0 has 1" in (tmp_path / "error 0").read_text()


def test_a_machine_that_waits_for_another_can_be_stopped(tmp_path: Path) -> None:
    forking = multiprocessing.get_context("fork")
    for rank in (0, 1):
        place = Place(1, 2, rank, f"127.0.0.1:{free_port()}")
        process = forking.Process(target=start_machine, args=([str(tmp_path)], place))
        process.start()
        time.sleep(0.5)
        process.terminate()
        process.join(60)
        assert process.exitcode == REQUEUE


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


def resume(folder: Path, *arguments: str) -> None:
    train_one(["--resume", str(folder), "--runtime.threads", "1", *arguments])


@pytest.fixture
def short(make_config: MakeConfig, tmp_path: Path) -> Path:
    """The folder of a run that has lost its result."""
    config = make_config(name="adamw", steps=6, precision="auto")
    folder = tmp_path / str(run(config, tmp_path, runtime=Runtime(threads=1))["hash"])
    (folder / "result.json").unlink()
    return folder


def test_resume_continues_the_run_of_a_folder(short: Path, make_config: MakeConfig) -> None:
    resume(short, "--optimizer.lr", "0.01")  # as it is
    (short / "result.json").unlink()
    file = short.parent / "run.toml"
    file.write_text(make_config(name="adamw", steps=6).to_toml())
    resume(short, str(file))
    assert (short / "result.json").exists()
    assert len([path for path in short.parent.iterdir() if path.is_dir()]) == 1


CHANGES: dict[str, Any] = {
    "one": (["--optimizer.lr", "0.002"], ["optimizer.lr is 0.01 in {} and 0.002 here"]),
    "two": (
        ["--training.seed", "3", "--evaluation.every", "2"],
        ["evaluation.every is 10 in {} and 2 here", "training.seed is 0 in {} and 3 here"],
    ),
    "optimizer": (
        ["--optimizer", "lion"],
        ["optimizer.name is \"adamw\" in {} and \"lion\" here", "optimizer.options.betas is "],
    ),
    "corpus": (
        ["--data.corpus", "{}/other.txt"],
        ["data.fingerprint is "],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CHANGES)
def test_resume_names_what_differs(case: str, short: Path, corpus: Path) -> None:
    flags, clauses = CHANGES[case]
    (short / "other.txt").write_text("\f".join(corpus.read_text().split("\f")[:40]))
    with pytest.raises(UserError) as caught:
        resume(short, *(flag.format(short) for flag in flags))
    for clause in clauses:
        assert clause.format(short) in str(caught.value)
    assert not (short / "result.json").exists()


def test_resume_needs_a_run_under_its_name(short: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Cannot read .*nowhere/config\.toml"):
        resume(tmp_path / "nowhere")
    other = short.rename(tmp_path / "other")
    with pytest.raises(UserError, match=f"holds run {short.name}, whose folder must have that"):
        resume(other)
