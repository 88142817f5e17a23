"""What a run writes down: metrics as it goes, its environment, its result."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import torch

import steepest
from steepest import files
from steepest.errors import UserError


class MetricsWriter:
    """Appends one JSON object per line; after `write`, a line survives the death of the process.

    All that it does raises UserError if the disk is full or must not be written to.
    """

    def __init__(self, path: Path) -> None:
        self._folder = path.parent
        with files.disk_errors(self._folder):
            self._file = path.open("a", encoding="utf-8")
            files.flush(self._folder)

    def write(self, record: dict[str, Any]) -> None:
        """Append a record. Numbers must be finite."""
        line = json.dumps(record, allow_nan=False) + "\n"
        with files.disk_errors(self._folder):
            self._file.write(line)
            self._file.flush()

    def sync(self) -> None:
        """Wait until all records are on the disk."""
        with files.disk_errors(self._folder):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        with files.disk_errors(self._folder):
            self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the records of a metrics file; damaged lines and a torn last one are left out."""
    if not path.exists():
        return []
    with path.open("rb") as lines:
        found = [_record(line) for line in lines]
    return [record for record in found if record is not None]


def truncate_metrics(path: Path, step: int) -> list[str]:
    """Drop the records of later steps than `step`, and a torn last line; -1 drops all.

    Returns a sentence if lines before these are damaged. It reads one line at a time, and either
    cuts the file or leaves it. Raises UserError if it cannot be read or written to.
    """
    if not path.exists():
        return []
    end = place = damaged = before = 0
    with files.disk_errors(path.parent), path.open("r+b") as file:
        for line in file:
            place += len(line)
            record = _record(line)
            if record is None:
                damaged += 1
            elif record["step"] <= step:
                end, before = place, damaged
        file.truncate(end)
    return (
        [f"{path.name} has damaged lines, {before} in all, which do not count."] if before else []
    )


def _record(line: bytes) -> dict[str, Any] | None:
    """Return the record in a line, None if it is torn or damaged."""
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file atomically. Numbers must be finite.

    Raises UserError if the disk is full or must not be written to.
    """
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    with files.disk_errors(path.parent):
        files.write_text(path, text)


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the object in a JSON file, None if there is no file.

    Raises UserError if it cannot be read or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(f"{path} could not be read: {error.strerror}.") from error
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged; restore it, or remove it to have it written again.")
    return content


def environment(device: torch.device) -> dict[str, Any]:
    """Return what the run executes on, as far as it can change bits or times."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "steepest": _version(),
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "threads": torch.get_num_threads(),
        "tf32": torch.backends.cuda.matmul.allow_tf32,
        "device": str(device),
        "gpu": gpu,
    }


def record_session(
    path: Path, current: dict[str, Any], started: str, step: int, warnings: list[str]
) -> list[str]:
    """Note in environment.json that a process works on the run from `step`; return all warnings.

    The file holds the environment of the first session, and one entry per session with its start,
    first step and warnings. A session in another environment gets a warning of its own: its losses
    need not be those of the first environment to the bit.
    """
    content = read_json(path) or {**current, "sessions": []}
    changed = [key for key in current if content.get(key) != current[key]]
    if changed:
        changes = ", ".join(f"{key} {content.get(key)} -> {current[key]}" for key in changed)
        warnings = [*warnings, f"Resumed at step {step} in another environment: {changes}."]
    content.setdefault("sessions", []).append(
        {"started": started, "step": step, "warnings": warnings}
    )
    write_json(path, content)
    return [warning for session in content["sessions"] for warning in session["warnings"]]


def _version() -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("steepest")
    except PackageNotFoundError:
        return None


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if sys.platform == "linux" and cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _git_commit() -> str | None:
    """Return the commit of steepest's own repository, with "+" after it if files have changed.

    None if the package is not tracked by git: the folder may lie in somebody else's repository.
    """
    package = Path(steepest.__file__).parent
    if _git(package, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    commit = _git(package, "rev-parse", "HEAD")
    dirty = _git(package, "status", "--porcelain", "--untracked-files=no", ".")
    return commit + "+" if commit and dirty else commit


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
