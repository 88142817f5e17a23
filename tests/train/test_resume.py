"""Runs that were killed end with the bits of runs that were not."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from steepest.errors import UserError
from steepest.train import RunConfig, read_metrics, run

from .conftest import MEASURED, MakeConfig
from .crash import RUNTIME

STEPS = 60
CRASH = Path(__file__).with_name("crash.py")

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(scope="module")
def config(make_config: MakeConfig, momentum_file: Path) -> RunConfig:
    """A run with all kinds of state: float64 tensors, torch's generator, accumulation, averages."""
    return make_config(
        name=f"{momentum_file}:Momentum",
        lr=0.1,
        options={"noise": 1e-4, "weight_decay": 0.1},
        steps=STEPS,
        gradient_accumulation=2,
        every=20,
        ema=(0.9,),
        windows=(6,),
        **{"averaging.every": 4},
    )


@pytest.fixture(scope="module")
def whole(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the run, done without interruption."""
    runs = tmp_path_factory.mktemp("whole")
    return runs / str(run(config, runs, runtime=RUNTIME)["hash"])


@pytest.fixture
def start(config: RunConfig, tmp_path: Path, child_environment: dict[str, str]) -> Start:
    """Return a function that starts the run in a process which dies at an instant."""
    file = tmp_path / "run.toml"
    file.write_text(config.to_toml())

    def start(instant: str, step: int) -> subprocess.Popen[str]:
        command = [sys.executable, str(CRASH), str(file), str(tmp_path / "runs"), instant]
        return subprocess.Popen(
            [*command, str(step)], env=child_environment, text=True, stderr=subprocess.PIPE
        )

    return start


def crash(start: Start, instant: str, step: int) -> None:
    process = start(instant, step)
    try:
        _, errors = process.communicate(timeout=180)
    finally:
        process.kill()
    if "Timeout" in errors:
        warnings.warn(f"A process took more than 20 seconds here: {errors}", stacklevel=2)
    assert process.returncode == -signal.SIGKILL, errors


def assert_same_bits(left: Any, right: Any, at: str = "") -> None:
    if isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype, at
        assert torch.equal(left, right), at
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), at
        for key in left:
            if key not in ("clock", *MEASURED):
                assert_same_bits(left[key], right[key], f"{at}.{key}")
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right), at
        for index, pair in enumerate(zip(left, right, strict=True)):
            assert_same_bits(*pair, f"{at}[{index}]")
    else:
        assert left == right, at


def assert_same_run(left: Path, right: Path) -> None:
    times = (*MEASURED, "tokens_per_second", "warnings")
    results = [json.loads((folder / "result.json").read_text()) for folder in (left, right)]
    assert_same_bits(
        *[{k: v for k, v in r.items() if k not in times and not k.endswith("_ms")} for r in results]
    )
    for name in ("metrics.jsonl", "dynamics.jsonl"):
        assert_same_bits(*[read_metrics(folder / name) for folder in (left, right)])
    checkpoints = [sorted((folder / "checkpoints").iterdir()) for folder in (left, right)]
    assert [path.name for path in checkpoints[0]] == [f"step-{STEPS:09d}.pt"]
    assert [path.name for path in checkpoints[1]] == [f"step-{STEPS:09d}.pt"]
    assert_same_bits(*[torch.load(path, weights_only=True) for (path,) in checkpoints])


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        ("record", 3, 0),
        ("record", 15, 14),
        ("torn", 40, 35),
        ("saving", 14, 7),
        ("saved", 42, 42),
        ("saved", STEPS, STEPS),
        ("result", 0, STEPS),
    ],
)
def test_killed_once(
    case: tuple[str, int, int], config: RunConfig, whole: Path, start: Start, tmp_path: Path
) -> None:
    instant, step, resumed_at = case
    crash(start, instant, step)
    run(config, tmp_path / "runs", runtime=RUNTIME)
    folder = tmp_path / "runs" / whole.name
    assert_same_run(folder, whole)
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["sessions"][-1]["step"] == resumed_at
    assert not [path for path in folder.rglob(".*") if path.is_file()]


@pytest.mark.slow
def test_killed_again_and_again(
    config: RunConfig, whole: Path, start: Start, tmp_path: Path
) -> None:
    for instant, step in [("torn", 2), ("record", 15), ("saving", 21), ("record", 59)]:
        crash(start, instant, step)
    run(config, tmp_path / "runs", runtime=RUNTIME)
    assert_same_run(tmp_path / "runs" / whole.name, whole)


@pytest.mark.slow
def test_locked_out_while_another_process_works_and_in_when_it_is_killed(
    config: RunConfig, whole: Path, start: Start, tmp_path: Path
) -> None:
    process = start("wait", 10)
    folder = tmp_path / "runs" / whole.name
    deadline = time.monotonic() + 60
    while len(read_metrics(folder / "metrics.jsonl")) < 11:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    with pytest.raises(UserError, match=f"Another process \\({process.pid} on .* works on the run"):
        run(config, tmp_path / "runs", runtime=RUNTIME)
    process.kill()
    process.communicate()
    run(config, tmp_path / "runs", runtime=RUNTIME)
    assert_same_run(folder, whole)


class Stop(Exception):
    """Ends a run from within, as Ctrl-C does."""


def stop_at(step: int) -> Callable[[Any], None]:
    def on_progress(progress: Any) -> None:
        if progress.step >= step:
            raise Stop

    return on_progress


@pytest.fixture
def stopped(config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the run, stopped at step 30: its checkpoints are of steps 21 and 28."""
    with monkeypatch.context() as patch:
        patch.setattr("steepest.train.loop.PROGRESS_SECONDS", 0)
        with pytest.raises(Stop):
            run(config, tmp_path, runtime=RUNTIME, on_progress=stop_at(30))
    (folder,) = tmp_path.iterdir()
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == ["step-000000021.pt", "step-000000028.pt"]
    return folder


def test_an_interrupted_run_lets_go_of_its_lock(
    config: RunConfig, stopped: Path, whole: Path
) -> None:
    run(config, stopped.parent, runtime=RUNTIME)
    assert_same_run(stopped, whole)


def test_times_go_on_where_they_were(config: RunConfig, stopped: Path) -> None:
    run(config, stopped.parent, runtime=RUNTIME)
    records = read_metrics(stopped / "metrics.jsonl")
    for times in (
        [record["seconds"] for record in records],
        [record["part_seconds"]["evaluation"] for record in records],
    ):
        assert times == sorted(times)
    (last,) = (stopped / "checkpoints").iterdir()
    steps = torch.load(last, weights_only=True)["clock"]["steps"]
    assert len(steps) == STEPS - 2  # the first of each process is no part of medians


@pytest.mark.parametrize("damage", ["truncated", "one bit", "empty"])
@pytest.mark.parametrize("count", [1, 2])
def test_a_damaged_checkpoint_is_passed_over_and_told(
    damage: str, count: int, config: RunConfig, stopped: Path, whole: Path
) -> None:
    for path in sorted((stopped / "checkpoints").iterdir())[-count:]:
        content = bytearray(path.read_bytes())
        if damage == "one bit":
            weights = torch.load(path, weights_only=True)["learner"]["model"]
            table = next(iter(weights.values())).numpy().tobytes()
            content[content.index(table) + 99] ^= 1
        path.write_bytes(content[: {"truncated": len(content) // 2, "empty": 0}.get(damage)])
    result = run(config, stopped.parent, runtime=RUNTIME)
    assert_same_run(stopped, whole)
    assert len(result["warnings"]) == count
    assert "The checkpoint step-000000028.pt could not be read" in result["warnings"][0]
    session = json.loads((stopped / "environment.json").read_text())["sessions"][-1]
    assert session["step"] == (21 if count == 1 else 0)
    assert session["warnings"] == result["warnings"]


def test_a_torn_record_and_records_after_the_checkpoint_are_dropped(
    config: RunConfig, stopped: Path, whole: Path
) -> None:
    metrics = stopped / "metrics.jsonl"
    before = read_metrics(metrics)
    with metrics.open("a") as file:
        file.write('{"kind": "train", "step": 31, "lo')
    assert read_metrics(metrics) == before
    run(config, stopped.parent, runtime=RUNTIME)
    assert_same_run(stopped, whole)


def test_a_checkpoint_of_another_run_is_refused(
    config: RunConfig, make_config: MakeConfig, stopped: Path, tmp_path: Path
) -> None:
    other = run(make_config(steps=30), tmp_path, runtime=RUNTIME)
    foreign = tmp_path / str(other["hash"]) / "checkpoints" / "step-000000030.pt"
    foreign.rename(stopped / "checkpoints" / foreign.name)
    with pytest.raises(UserError, match=f"is of run {other['hash']}, not {stopped.name}"):
        run(config, stopped.parent, runtime=RUNTIME)


def test_another_environment_is_told(config: RunConfig, stopped: Path) -> None:
    path = stopped / "environment.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "torch": "1.0"}))
    (warning,) = run(config, stopped.parent, runtime=RUNTIME)["warnings"]
    assert "Resumed at step 28 in another environment: torch 1.0 -> 2." in warning
