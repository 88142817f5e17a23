"""Reading a race from its directory.

race.json                 what was compared, and the hashes of its runs
runs/<hash>/result.json   the outcome of a run, there once it is complete
runs/<hash>/metrics.jsonl its losses on the way
runs/<hash>/environment.json, config.toml
"""

from __future__ import annotations

import json
import math
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from steepest.analysis.runs import Evaluation, Run
from steepest.errors import UserError

SCHEMA = 1

Stage = Literal["tuning", "final"]


@dataclass(frozen=True)
class UnfinishedRun:
    """A run of the race without a result: not started, in progress or stopped.

    `lr` and `seed` are None until its config is written; the progress is that of its last record.
    """

    hash: str
    optimizer: str
    stage: Stage
    lr: float | None
    seed: int | None
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Race:
    """A race as it is on disk. Names and hashes are in the order of race.json."""

    directory: Path
    created: str
    baseline: str
    optimizers: tuple[str, ...]
    protocol: dict[str, str | int | float | bool]
    seconds: float
    tuning: dict[str, tuple[str, ...]]
    final: dict[str, tuple[str, ...]]
    runs: dict[str, Run]
    """The complete runs, by hash."""
    unfinished: tuple[UnfinishedRun, ...]
    environments: dict[str, dict[str, Any]]
    """What each run executed on, by hash."""

    @property
    def tuning_runs(self) -> list[Run]:
        """The complete runs that the learning rates were chosen by."""
        return self._complete(self.tuning)

    @property
    def final_runs(self) -> list[Run]:
        """The complete runs that the ranking is made of."""
        return self._complete(self.final)

    def run_directory(self, run_hash: str) -> Path:
        """Return the directory of a run."""
        return self.directory / "runs" / run_hash

    def _complete(self, stage: dict[str, tuple[str, ...]]) -> list[Run]:
        hashes = (run_hash for of_one in stage.values() for run_hash in of_one)
        return [self.runs[run_hash] for run_hash in hashes if run_hash in self.runs]


def load_race(directory: Path) -> Race:
    """Read a race and its runs.

    A torn last line of metrics.jsonl is left out, and so are losses that are not finite. A run
    without result.json is listed in `unfinished`. Raises UserError for a file that is missing,
    damaged or of another schema.
    """
    directory = Path(directory)
    path = directory / "race.json"
    if not path.exists():
        raise UserError(f"{directory} is not the directory of a race: it has no race.json.")
    manifest = _read_json(path)
    _check_schema(manifest, path)
    try:
        tuning = {name: tuple(hashes) for name, hashes in manifest["tuning"].items()}
        final = {name: tuple(hashes) for name, hashes in manifest["final"].items()}
        owners = _owners({"tuning": tuning, "final": final}, path)
        complete = {h for h in owners if (directory / "runs" / h / "result.json").exists()}
        return Race(
            directory=directory,
            created=str(manifest["created"]),
            baseline=str(manifest["baseline"]),
            optimizers=tuple(manifest["optimizers"]),
            protocol=dict(manifest["protocol"]),
            seconds=float(manifest["seconds"]),
            tuning=tuning,
            final=final,
            runs={h: _run(directory / "runs" / h, owners[h][0]) for h in owners if h in complete},
            unfinished=tuple(
                _unfinished(directory / "runs" / h, *owners[h]) for h in owners if h not in complete
            ),
            environments={h: _environment(directory / "runs" / h) for h in owners},
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, error) from error


def _owners(
    stages: dict[Stage, dict[str, tuple[str, ...]]], path: Path
) -> dict[str, tuple[str, Stage]]:
    """Return the optimizer and the (last) stage of each hash; an optimizer's runs are its own."""
    owners: dict[str, tuple[str, Stage]] = {}
    for stage, groups in stages.items():
        for name, hashes in groups.items():
            for run_hash in hashes:
                other = owners.get(run_hash, (name, stage))[0]
                if other != name:
                    raise UserError(
                        f"{path} lists the run {run_hash} under {other!r} and {name!r}; "
                        "a run belongs to one optimizer."
                    )
                owners[run_hash] = (name, stage)
    return owners


def _run(folder: Path, optimizer: str) -> Run:
    path = folder / "result.json"
    result = _read_json(path)
    _check_schema(result, path)
    metrics = _read_metrics(folder / "metrics.jsonl")
    try:
        if result["hash"] != folder.name:
            raise UserError(f"{path} is the result of run {result['hash']}, not of {folder.name}.")
        return Run(
            hash=folder.name,
            optimizer=optimizer,
            lr=float(result["lr"]),
            seed=int(result["seed"]),
            status=str(result["status"]),
            steps=int(result["steps"]),
            tokens=int(result["tokens"]),
            val_loss=_finite(result["val_loss"]),
            bits_per_byte=_finite(result["val_bits_per_byte"]),
            step_ms=float(result["step_ms"]),
            optimizer_ms=float(result["optimizer_ms"]),
            tokens_per_second=float(result["tokens_per_second"]),
            seconds=float(result["seconds"]),
            parameters=int(result["parameters"]),
            parameter_bytes=int(result["parameter_bytes"]),
            state_bytes=int(result["state_bytes"]),
            diverged_at_step=result["diverged_at_step"],
            reason=result["reason"],
            evaluations=_evaluations(metrics, folder),
            train_curve=_train_curve(metrics, folder),
            warnings=tuple(str(warning) for warning in result.get("warnings", ())),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, error) from error


def _evaluations(metrics: list[dict[str, Any]], folder: Path) -> tuple[Evaluation, ...]:
    try:
        return tuple(
            Evaluation(int(m["step"]), int(m["tokens"]), float(m["val_loss"]), float(m["seconds"]))
            for m in metrics
            if m["kind"] == "eval" and _finite(m["val_loss"]) is not None
        )
    except (KeyError, TypeError) as error:
        raise _damaged(folder / "metrics.jsonl", error) from error


def _train_curve(metrics: list[dict[str, Any]], folder: Path) -> tuple[tuple[int, float], ...]:
    try:
        return tuple(
            (int(m["step"]), float(m["loss"]))
            for m in metrics
            if m["kind"] == "train" and _finite(m["loss"]) is not None
        )
    except (KeyError, TypeError) as error:
        raise _damaged(folder / "metrics.jsonl", error) from error


def _unfinished(folder: Path, optimizer: str, stage: Stage) -> UnfinishedRun:
    last = (_read_metrics(folder / "metrics.jsonl") or [{}])[-1]
    lr, seed = None, None
    path = folder / "config.toml"
    if path.exists():
        try:
            config = tomllib.loads(path.read_text(encoding="utf-8"))
            lr, seed = float(config["optimizer"]["lr"]), int(config["training"]["seed"])
        except (ValueError, KeyError, TypeError) as error:
            raise _damaged(path, error) from error
    tokens, seconds = int(last.get("tokens", 0)), float(last.get("seconds", 0))
    return UnfinishedRun(folder.name, optimizer, stage, lr, seed, tokens, seconds)


def _environment(folder: Path) -> dict[str, Any]:
    path = folder / "environment.json"
    return _read_json(path) if path.exists() else {}


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the records of metrics.jsonl; what follows the last line break is not whole."""
    if not path.exists():
        return []
    complete, _, _ = path.read_bytes().rpartition(b"\n")
    records = []
    for number, line in enumerate(complete.splitlines(), start=1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise UserError(
                f"Line {number} of {path} is damaged ({error}); remove the run's directory and "
                "run the race again to repeat it."
            ) from error
    return records


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: it should hold a JSON object.")
    return content


def _check_schema(content: dict[str, Any], path: Path) -> None:
    if content.get("schema") != SCHEMA:
        raise UserError(
            f"{path} has schema {content.get('schema')!r}, and this version of steepest reads "
            f"schema {SCHEMA}."
        )


def _damaged(path: Path, error: Exception) -> UserError:
    what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
    return UserError(f"{path} is damaged: {what}.")


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)
