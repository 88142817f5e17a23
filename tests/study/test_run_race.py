"""Races with real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from tests.study.test_plan import make_plan

from steepest.errors import UserError
from steepest.study import plan as planning
from steepest.study.race import run_race
from steepest.study.store import load_race

pytestmark = pytest.mark.slow

MINE = """
import torch

class Mine(torch.optim.Optimizer):
    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(group["lr"] * p.grad / (p.grad.norm() + 1e-8))
"""


class Silent:
    """A watcher that only remembers the labels of what ended."""

    def __init__(self) -> None:
        self.ended: list[str] = []

    def progress(self, task: object, progress: object) -> None: ...

    def finished(self, task: object, result: dict[str, object]) -> None:
        self.ended.append(str(result["hash"]))


def _group_ends(group: int, seconds: float) -> bool:
    """Return whether a process group is empty within a time."""
    for _ in range(int(seconds / 0.1)):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    os.killpg(group, signal.SIGKILL)
    return False


def losses(out: Path) -> dict[str, float | None]:
    return {run.hash: run.val_loss for run in load_race(out).runs.values()}


def test_race_ranks_extends_and_repeats_nothing(tmp_path: Path) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text(MINE)
    out = tmp_path / "race"
    first = Silent()
    run_race(make_plan("adamw", f"{mine}:Mine", seeds=2), out, jobs=2, watcher=first)
    race = load_race(out)
    assert set(race.optimizers) == {"adamw", f"{mine}:Mine"}
    assert all(len(hashes) == 2 for hashes in race.final.values())
    assert not race.unfinished
    assert len(first.ended) == len(set(first.ended)) == len(race.runs)
    tuned = {run.lr: run.val_loss for run in race.tuning_runs if run.optimizer == "adamw"}
    best = min(tuned, key=lambda lr: tuned[lr] or float("inf"))
    assert {run.lr for run in race.final_runs if run.optimizer == "adamw"} == {best}

    written = {path: path.stat().st_mtime_ns for path in out.glob("runs/*/result.json")}
    run_race(make_plan("adamw", "lion", seeds=2), out, jobs=1, watcher=Silent())
    assert all(path.stat().st_mtime_ns == at for path, at in written.items())
    assert set(load_race(out).optimizers) == {"adamw", f"{mine}:Mine", "lion"}

    assert load_race(out).baseline == "adamw"

    more = replace(make_plan("lion", seeds=2), entrants=(planning.entrant("lion", (2e-3,)),))
    tried = set(load_race(out).tuning["lion"])
    run_race(more, out, jobs=1, watcher=Silent())
    assert tried < set(load_race(out).tuning["lion"])  # what was tried before still counts
    with pytest.raises(UserError, match="not in the race"):
        run_race(replace(more, baseline="soap"), out, jobs=1, watcher=Silent())

    with pytest.raises(UserError, match="another protocol"):
        run_race(make_plan("adamw", seeds=2, tokens=8192), out, jobs=1, watcher=Silent())


def test_losses_do_not_depend_on_what_runs_beside(tmp_path: Path) -> None:
    plan = make_plan("sgd", "adamw", seeds=1)
    run_race(plan, tmp_path / "one", jobs=1, watcher=Silent())
    run_race(plan, tmp_path / "three", jobs=3, watcher=Silent())
    assert losses(tmp_path / "one") == losses(tmp_path / "three")


def test_killed_race_continues_to_the_same_losses(tmp_path: Path) -> None:
    plan = make_plan("adamw", seeds=1)
    run_race(plan, tmp_path / "whole", jobs=2, watcher=Silent())
    script = (
        "from pathlib import Path\n"
        "from tests.study.test_plan import make_plan\n"
        "from tests.study.test_run_race import Silent, run_race\n"
        "if __name__ == '__main__':\n"
        "    plan = make_plan('adamw', seeds=1)\n"
        f"    run_race(plan, Path({str(tmp_path / 'killed')!r}), jobs=2, watcher=Silent())\n"
    )
    path = tmp_path / "script.py"
    path.write_text(script)
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, path],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
        start_new_session=True,
    )
    killed = tmp_path / "killed"
    deadline = time.monotonic() + 120
    while not list(killed.glob("runs/*/metrics.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()  # the parent alone: its workers must not go on without it
    process.wait()
    assert _group_ends(process.pid, seconds=10)
    assert json.loads((killed / "race.json").read_text())["tuning"]["adamw"]
    run_race(plan, killed, jobs=2, watcher=Silent())
    assert losses(killed) == losses(tmp_path / "whole")
