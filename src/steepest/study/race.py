"""Running a race: choose each optimizer's learning rate, then rank at it on fresh seeds."""

from __future__ import annotations

import datetime
import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from steepest import data, files
from steepest.errors import UserError
from steepest.study.executor import LocalExecutor, Task
from steepest.study.plan import Entrant, RacePlan
from steepest.study.store import SCHEMA
from steepest.train import Progress, RunConfig, resolve


class Watcher(Protocol):
    """What a race tells whoever watches it."""

    def progress(self, task: Task, progress: Progress) -> None:
        """Say how far a run is."""

    def finished(self, task: Task, result: dict[str, Any]) -> None:
        """Say how a run ended."""


@dataclass
class _Standing:
    """How far one optimizer is."""

    entrant: Entrant
    tuning: dict[str, float] = field(default_factory=dict)
    """Learning rates by run hash."""
    losses: dict[float, float] = field(default_factory=dict)
    """Final losses by learning rate; infinite where the run diverged."""
    final: list[str] = field(default_factory=list)

    def best_lr(self) -> float | None:
        """Return the learning rate with the lowest loss, None if every run diverged."""
        lr = min(self.losses, key=lambda lr: self.losses[lr])
        return lr if math.isfinite(self.losses[lr]) else None


def run_race(plan: RacePlan, out: Path, *, jobs: int, watcher: Watcher) -> None:
    """Do the runs of a race that have no result in `out` yet, `jobs` at a time.

    race.json names the runs from the start, so a race that is stopped can be looked at, and
    continues when it is run again. Raises UserError if `out` holds a race of another protocol.
    """
    started = time.monotonic()
    tokens = data.prepare(plan.base.data.corpus, plan.base.data.vocab_size)
    before = _earlier(out, plan)
    standings = [_Standing(entrant) for entrant in plan.entrants]
    owners: dict[str, tuple[_Standing, Task]] = {}

    def add(standing: _Standing, config: RunConfig, stage: str) -> Task:
        config = resolve(config, tokens)
        task = Task(f"{standing.entrant.name} {stage} lr {config.optimizer.lr:g}", config)
        owners[config.hash()] = (standing, task)
        return task

    tasks = []
    for standing in standings:
        for config in plan.tuning(standing.entrant):
            tasks.append(add(standing, config, "tuning"))
            standing.tuning[tasks[-1].config.hash()] = config.optimizer.lr
    _write(out, plan, standings, before, started)

    executor = LocalExecutor(jobs, out / "runs", watcher.progress)
    try:
        for task in tasks:
            executor.submit(task)
        for outcome in executor.outcomes():
            watcher.finished(outcome.task, outcome.result)
            config_hash = outcome.result["hash"]
            standing, _ = owners[config_hash]
            if config_hash not in standing.tuning:
                continue
            loss = outcome.result["val_loss"]
            standing.losses[standing.tuning[config_hash]] = math.inf if loss is None else loss
            lr = standing.best_lr()
            if len(standing.losses) == len(standing.tuning) and lr is not None:
                for config in plan.final(standing.entrant, lr):
                    task = add(standing, config, f"seed {config.training.seed}")
                    standing.final.append(task.config.hash())
                    executor.submit(task)
                _write(out, plan, standings, before, started)
    finally:
        executor.close()
    _write(out, plan, standings, before, started)


def _earlier(out: Path, plan: RacePlan) -> dict[str, Any]:
    """Return the race.json that is there, empty if none, after checking that it can be extended."""
    path = out / "race.json"
    if not path.exists():
        return {}
    try:
        manifest: dict[str, Any] = json.loads(path.read_text())
        theirs = manifest["protocol"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is damaged; choose another directory with --out.") from None
    ours = plan.protocol()
    differing = [key for key in ours if theirs.get(key) != ours[key]]
    if differing:
        key = differing[0]
        raise UserError(
            f"{out} holds a race of another protocol ({key} {theirs.get(key)}, not {ours[key]}); "
            "results of different protocols are not mixed, so choose another directory with --out."
        )
    return manifest


def _write(
    out: Path, plan: RacePlan, standings: list[_Standing], before: dict[str, Any], started: float
) -> None:
    """Write race.json, with the optimizers of an earlier race of the same protocol kept."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    mine = {standing.entrant.name: standing for standing in standings}
    kept = [name for name in before.get("optimizers", []) if name not in mine]

    def merged(stage: str, ours: dict[str, list[str]]) -> dict[str, list[str]]:
        return {name: before[stage].get(name, []) for name in kept} | ours

    manifest = {
        "schema": SCHEMA,
        "created": before.get("created", now),
        "baseline": plan.baseline,
        "optimizers": kept + list(mine),
        "protocol": plan.protocol(),
        "tuning": merged("tuning", {name: list(s.tuning) for name, s in mine.items()}),
        "final": merged("final", {name: s.final for name, s in mine.items()}),
        "seconds": before.get("seconds", 0.0) + time.monotonic() - started,
    }
    files.write_text(out / "race.json", json.dumps(manifest, indent=1))
