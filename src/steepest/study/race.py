"""Running a race: choose each optimizer's learning rate, then rank at it on fresh seeds."""

from __future__ import annotations

import datetime
import json
import math
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from steepest import data, files
from steepest.errors import UserError
from steepest.study.executor import LocalExecutor, Task
from steepest.study.plan import Entrant, RacePlan, defaults
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

    def add(self, result: dict[str, Any]) -> None:
        """Take in a tuning run."""
        self.tuning[result["hash"]] = result["lr"]
        loss = result["val_loss"]
        self.losses[result["lr"]] = math.inf if loss is None else loss

    def best_lr(self) -> float | None:
        """Return the learning rate with the lowest loss, None if every run diverged."""
        lr = min(self.losses, key=lambda lr: self.losses[lr])
        return lr if math.isfinite(self.losses[lr]) else None


class _Race:
    """A race under way in a directory that is its own."""

    def __init__(self, plan: RacePlan, out: Path, watcher: Watcher) -> None:
        self.plan, self.out, self.watcher = plan, out, watcher
        self.started = time.monotonic()
        self.tokens = data.prepare(plan.base.data.corpus, plan.base.data.vocab_size)
        self.before = _earlier(out, plan)
        self.standings = [_Standing(entrant) for entrant in plan.entrants]
        self.owners: dict[str, _Standing] = {}

    def run(self, jobs: int) -> None:
        """Do the runs that have no result yet."""
        tasks = [task for standing in self.standings for task in self.tuning_tasks(standing)]
        self.write()
        executor = LocalExecutor(
            min(jobs, self.plan.runs), self.out / "runs", self.watcher.progress
        )
        try:
            for task in tasks:
                executor.submit(task)
            for outcome in executor.outcomes():
                self.watcher.finished(outcome.task, outcome.result)
                for task in self.next_tasks(outcome.result):
                    executor.submit(task)
        finally:
            executor.close()
            self.write()

    def tuning_tasks(self, standing: _Standing) -> list[Task]:
        """Return an entrant's tuning runs, and take in those of an earlier race that fit."""
        name = standing.entrant.name
        standing.final = list(self.before.get("final", {}).get(name, []))
        tasks = [self.task(standing, c, "tuning") for c in self.plan.tuning(standing.entrant)]
        for task in tasks:
            standing.tuning[task.config.hash()] = task.config.optimizer.lr
        like = replace(tasks[0].config.optimizer, lr=1.0)
        for run_hash in self.before.get("tuning", {}).get(name, []):
            path = self.out / "runs" / run_hash / "result.json"
            if run_hash not in standing.tuning and path.exists():
                result = json.loads(path.read_text())
                if replace(RunConfig.from_dict(result["config"]).optimizer, lr=1.0) == like:
                    standing.add(result)
        return tasks

    def next_tasks(self, result: dict[str, Any]) -> list[Task]:
        """Take in a result; return the final runs if it was the last that chooses the lr."""
        standing = self.owners[result["hash"]]
        if result["hash"] not in standing.tuning:
            return []
        standing.add(result)
        lr = standing.best_lr()
        if len(standing.losses) < len(standing.tuning) or lr is None:
            return []
        configs = self.plan.final(standing.entrant, lr)
        tasks = [self.task(standing, c, f"seed {c.training.seed}") for c in configs]
        standing.final = [task.config.hash() for task in tasks]
        self.write()
        return tasks

    def task(self, standing: _Standing, config: RunConfig, stage: str) -> Task:
        """Return a run of an entrant, and remember whose it is."""
        config = resolve(config, self.tokens)
        self.owners[config.hash()] = standing
        return Task(f"{standing.entrant.name} {stage} lr {config.optimizer.lr:g}", config)

    def write(self) -> None:
        """Write race.json, with the optimizers of an earlier race of the same protocol kept."""
        before = self.before
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        mine = {standing.entrant.name: standing for standing in self.standings}
        kept = [name for name in before.get("optimizers", []) if name not in mine]

        def merged(stage: str, ours: dict[str, list[str]]) -> dict[str, list[str]]:
            return {name: before[stage].get(name, []) for name in kept} | ours

        manifest = {
            "schema": SCHEMA,
            "created": before.get("created", now),
            "baseline": _baseline(self.plan, before),
            "optimizers": kept + list(mine),
            "protocol": self.plan.protocol(),
            "tuning": merged("tuning", {name: list(s.tuning) for name, s in mine.items()}),
            "final": merged("final", {name: s.final for name, s in mine.items()}),
            "seconds": before.get("seconds", 0.0) + time.monotonic() - self.started,
        }
        files.write_text(self.out / "race.json", json.dumps(manifest, indent=1))


def _baseline(plan: RacePlan, before: dict[str, Any]) -> str:
    """Return the baseline asked for, else that of the earlier race, else adamw or the first."""
    names = [*before.get("optimizers", []), *(entrant.name for entrant in plan.entrants)]
    if plan.baseline is not None and plan.baseline not in names:
        raise UserError(f"The baseline {plan.baseline} is not in the race; add it.")
    preferred = (plan.baseline, before.get("baseline"), defaults()["protocol"]["baseline"])
    return next((name for name in preferred if name is not None and name in names), names[0])


def run_race(plan: RacePlan, out: Path, *, jobs: int, watcher: Watcher) -> None:
    """Do the runs of a race that have no result in `out` yet, `jobs` at a time.

    race.json names the runs from the start, so a race that is stopped can be looked at, and
    continues when it is run again. A race of the same protocol in `out` is extended: its other
    optimizers stay, and so do the learning rates it tried. Raises UserError if `out` holds a race
    of another protocol, or if another process races there.
    """
    _baseline(plan, _earlier(out, plan))  # what is wrong with them is said before anything is made
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"The directory of the race, {out}, cannot be made: {error.strerror}; choose another "
            "with --out."
        ) from None
    with (out / "lock").open("a+", encoding="utf-8") as lock:
        files.claim(lock, f"works on the race in {out}", "choose another directory with --out")
        files.sign(lock)
        _Race(plan, out, watcher).run(jobs)


def _earlier(out: Path, plan: RacePlan) -> dict[str, Any]:
    """Return the race.json that is there, empty if none, after checking that it can be extended."""
    path = out / "race.json"
    if not path.exists():
        return {}
    try:
        manifest: dict[str, Any] = json.loads(path.read_text())
        theirs = manifest["protocol"]
        known = manifest["schema"] == SCHEMA
    except (ValueError, KeyError, TypeError):
        known = False
    if not known:
        raise UserError(f"{path} is damaged or of another version; choose another --out.")
    ours = plan.protocol()
    differing = [key for key in ours if theirs.get(key) != ours[key]]
    if differing:
        key = differing[0]
        raise UserError(
            f"{out} holds a race of another protocol ({key} {theirs.get(key)}, not {ours[key]}); "
            "results of different protocols are not mixed, so choose another directory with --out."
        )
    return manifest
