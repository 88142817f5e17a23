"""Checkpoints: whole or not there, checked when read, the last ones kept."""

from __future__ import annotations

import errno
import os
import pickle
import re
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch

import steepest
from steepest import files
from steepest.errors import UserError

SCHEMA = 3
"""Of the content of a checkpoint, and of a result; another one is refused with a sentence."""

NAME = re.compile(r"step-(\d{9,})(\.permanent)?\.pt")
"""Names of checkpoints: those that stay for good say so, whatever a later process is told."""

FOLDER_BIT = 0x10
"""Attribute of an archive's entry that is a folder, of which torch reads nothing."""


_OF_DAMAGE = (
    OSError,
    EOFError,
    KeyError,
    RuntimeError,
    ValueError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    zlib.error,
)
"""What reading a damaged file can raise."""


class _Damaged(UserError):
    """A file that is not the checkpoint that was written."""


def path_of(folder: Path, step: int, *, permanent: bool = False) -> Path:
    """Return the file of the checkpoint at `step`."""
    return folder / f"step-{step:09d}{'.permanent' if permanent else ''}.pt"


def save(
    folder: Path, step: int, state: dict[str, Any], keep: int = 2, permanent_every: int = 0
) -> None:
    """Write the checkpoint of `step` atomically, then remove those it makes superfluous.

    The last `keep` stay, and for good those of the steps that `permanent_every` divides. Those of
    later steps go: the run has come here again because they could not be read. Raises UserError if
    the folder is gone or cannot be written to; the checkpoints in it are then as they were.
    """
    if not folder.is_dir():
        raise UserError(
            f"{folder} is gone; the folder of a run cannot be moved while the run works in it."
        )
    permanent = permanent_every > 0 and step % permanent_every == 0
    path = path_of(folder, step, permanent=permanent)
    with files.disk_errors(folder), files.replacing(path) as temporary:
        _write(temporary, state)
    prune(folder, step, keep)


def prune(folder: Path, step: int, keep: int) -> None:
    """Remove the checkpoints that `save` removes after `step`, if a kill has kept it from that.

    Raises UserError if the folder cannot be written to.
    """
    found = _newest_first(folder)
    later = [path for path in found if _step(path) > step]
    older = [path for path in found[len(later) + keep :] if not _is_permanent(path)]
    with files.disk_errors(folder):
        for path in later + older:
            path.unlink(missing_ok=True)


def _write(path: Path, state: dict[str, Any]) -> None:
    try:
        with path.open("wb") as file:
            torch.save(state, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):  # torch ends with a complaint of its own
            raise error.__context__ from None
        raise


def load_newest(folder: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """Return the newest undamaged checkpoint, on the CPU, and a sentence per damaged newer one.

    None if there is none. Checksums are verified, and nothing but tensors and plain values is
    unpickled. Raises UserError for one that another version of steepest wrote, and for one that may
    be whole but that the disk does not give: to pass over it would lose what the run has done.
    """
    warnings: list[str] = []
    for path in _newest_first(folder):
        try:
            state = _read(path)
        except _Damaged as error:
            warnings.append(str(error))
        else:
            return _of_this_schema(state, path), warnings
    return None, warnings


def load(path: Path) -> dict[str, Any]:
    """Return a checkpoint as `load_newest` does; raise UserError if it cannot be read."""
    return _of_this_schema(_read(path), path)


def _read(path: Path) -> Any:
    try:
        _verify(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except _OF_DAMAGE as error:
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        if _is_of_the_machine(error):
            raise UserError(
                f"The checkpoint {path} could not be read ({first_line}); see to that, or remove "
                "it to continue from the one before."
            ) from error
        raise _Damaged(f"The checkpoint {path.name} could not be read ({first_line}).") from error


def _is_of_the_machine(error: Exception) -> bool:
    """Return whether the file may be whole: its disk or this machine's memory failed."""
    if isinstance(error, OSError):
        return error.errno != errno.EINVAL  # which a damaged list of contents leads to
    return "allocate memory" in str(error)


def _verify(path: Path) -> None:
    """Raise ValueError or BadZipFile for a damaged file; torch.load looks at no checksums."""
    with zipfile.ZipFile(path) as archive:
        folders = [e.filename for e in archive.infolist() if e.external_attr & FOLDER_BIT]
        damaged = folders[0] if folders else archive.testzip()
    if damaged is not None:
        raise ValueError(f"{damaged} is damaged")


def _of_this_schema(state: Any, path: Path) -> dict[str, Any]:
    schema = state.get("schema") if isinstance(state, dict) else None
    if schema != SCHEMA:
        raise UserError(
            f"The checkpoint {path} has schema {schema}, and this version of steepest reads schema "
            f"{SCHEMA}; use the version that wrote it, or remove the checkpoint to begin anew."
        )
    found: dict[str, Any] = state
    return found


def newest(folder: Path) -> Path | None:
    """Return the file of the newest checkpoint, None if there is none."""
    return next(iter(_newest_first(folder)), None)


def _newest_first(folder: Path) -> list[Path]:
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{folder} could not be read: {error.strerror}.") from error
    found = [folder / name for name in names if NAME.fullmatch(name)]
    return sorted(found, key=lambda path: (_step(path), path.name), reverse=True)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-").partition(".")[0])


def _is_permanent(path: Path) -> bool:
    return path.name.endswith(".permanent.pt")


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load an optimizer's state to the bit.

    torch's own `load_state_dict` casts state to the dtype of its parameter, which would change a
    bfloat16 momentum or a float64 sum; what it cast is put back here.
    """
    optimizer.load_state_dict(state)
    if isinstance(optimizer, steepest.Optimizer):  # It casts nothing.
        return
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    indices = [index for group in state["param_groups"] for index in group["params"]]
    for index, parameter in zip(indices, parameters, strict=True):
        loaded = optimizer.state.get(parameter, {})
        for key, value in state["state"].get(index, {}).items():
            if isinstance(value, torch.Tensor) and loaded[key].dtype != value.dtype:
                loaded[key] = value.to(parameter.device)
