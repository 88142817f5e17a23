"""The directory of a run: one config, one process at a time."""

from __future__ import annotations

import fcntl
import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steepest import files
from steepest.errors import UserError
from steepest.train import records
from steepest.train.config import RunConfig
from steepest.train.identity import differences


@dataclass(frozen=True)
class RunFolder:
    """Where the parts of a run are."""

    path: Path

    @property
    def config(self) -> Path:
        """The config that the run was started with."""
        return self.path / "config.toml"

    @property
    def environment(self) -> Path:
        """What it ran on."""
        return self.path / "environment.json"

    @property
    def metrics(self) -> Path:
        """One record per line."""
        return self.path / "metrics.jsonl"

    @property
    def dynamics(self) -> Path:
        """One record per tensor and measured step, if `runtime.dynamics_every` asked for them."""
        return self.path / "dynamics.jsonl"

    @property
    def result(self) -> Path:
        """Present once the run is complete."""
        return self.path / "result.json"

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / "checkpoints"

    def read_result(self) -> dict[str, Any] | None:
        """Return the content of result.json, or None if the run is not complete."""
        if not self.result.exists():
            return None
        result: dict[str, Any] = json.loads(self.result.read_text(encoding="utf-8"))
        return result

    def write_result(self, result: dict[str, Any]) -> None:
        """Complete the run."""
        records.write_json(self.result, result)


def locate(runs_dir: Path, config: RunConfig) -> RunFolder:
    """Return the folder of a resolved config, whether it exists or not.

    Raises UserError if it holds a run of another config.
    """
    identity = config.hash()
    folder = RunFolder(runs_dir / identity)
    if folder.config.exists():
        found = RunConfig.from_toml(folder.config)
        differing = differences(found.to_dict(), config.to_dict(), "the file")
        if differing:
            raise UserError(
                f"{folder.path} belongs to run {identity}, but its config.toml is that of another "
                f"one: {', '.join(differing)}; restore the file or remove the folder."
            )
    return folder


def check_resumes(folder: RunFolder, config: RunConfig) -> None:
    """Raise UserError unless a resolved config is that of the run in the folder.

    The sentence names every key that differs. A run is found by its folder's name, so that one
    must be as it was, too.
    """
    found = RunConfig.from_toml(folder.config)
    if differing := differences(found.to_dict(), config.to_dict(), str(folder.path)):
        raise UserError(
            f"{', '.join(differing)}; a run continues with the config that it has, so leave these "
            "as they were, or start another run without --resume."
        )
    if folder.path.resolve().name != config.hash():
        raise UserError(
            f"{folder.path} holds run {config.hash()}, whose folder must have that name; rename it."
        )


@contextmanager
def opened(runs_dir: Path, config: RunConfig, *, shared: bool = False) -> Iterator[RunFolder]:
    """Yield the folder of a resolved config, made if needed, while no other process works in it.

    With `shared` this process helps another one that has opened it, and only reads.

    Raises UserError if another process does, or if the folder holds a run of another config.
    """
    folder = locate(runs_dir, config)
    if shared:
        yield folder
        return
    folder.checkpoints.mkdir(parents=True, exist_ok=True)
    with (folder.path / "lock").open("a+", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.seek(0)
            raise UserError(
                f"Another process ({lock.read().strip() or 'just started'}) works on the run in "
                f"{folder.path}; wait until it ends, or use another runs directory."
            ) from None
        lock.truncate(0)
        lock.write(f"{os.getpid()} on {platform.node()}\n")
        lock.flush()
        for leftover in (*folder.path.glob(".*"), *folder.checkpoints.glob(".*")):
            if leftover.is_file():
                leftover.unlink()  # of a write that was killed
        if not folder.config.exists():
            files.write_text(folder.config, config.to_toml())
        yield folder
