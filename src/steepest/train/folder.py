"""The directory of a run: one config, one process at a time."""

from __future__ import annotations

import os
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
        """Return the content of result.json, or None if the run is not complete.

        Raises UserError if the file cannot be read.
        """
        return records.read_json(self.result)

    def write_result(self, result: dict[str, Any]) -> None:
        """Complete the run. Raises UserError if the folder is gone or cannot be written to."""
        if not self.path.is_dir():
            raise UserError(
                f"{self.path} is gone; the folder of a run cannot be moved while the run works "
                "in it."
            )
        records.write_json(self.result, result)


def locate(runs_dir: Path, config: RunConfig) -> RunFolder:
    """Return the folder of a resolved config, whether it exists or not.

    Raises UserError if it holds a run of another config.
    """
    identity = config.hash()
    folder = RunFolder(runs_dir / identity)
    if os.path.lexists(folder.config):
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
            f"{folder.path} holds run {config.hash()}, whose folder must have that name: it was "
            "renamed, or another version of steepest began it; rename it back, or use that version."
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
    with files.disk_errors(folder.path, "; choose another runs directory."):
        files.make_folder(folder.checkpoints)
        lock = (folder.path / "lock").open("a+", encoding="utf-8")
    with lock:
        work = f"works on the run in {folder.path}"
        files.claim(lock, work, "use another runs directory")
        with files.disk_errors(folder.path):
            files.sign(lock)
            files.remove_leftovers(folder.path)
            files.remove_leftovers(folder.checkpoints)
            if not folder.config.exists():
                files.write_text(folder.config, config.to_toml())
        yield folder
