"""Checkpoints: whole or not there, checked when read, the last ones kept."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

import steepest
from steepest import files
from steepest.errors import UserError

SCHEMA = 2
"""Of the content of a checkpoint, and of a result; another one is refused with a sentence."""


def path_of(folder: Path, step: int) -> Path:
    """Return the file of the checkpoint at `step`."""
    return folder / f"step-{step:09d}.pt"


def save(
    folder: Path, step: int, state: dict[str, Any], keep: int = 2, permanent_every: int = 0
) -> None:
    """Write the checkpoint of `step` atomically, then remove older ones.

    The last `keep` stay, and those of the steps that `permanent_every` divides.
    """
    with files.replacing(path_of(folder, step)) as temporary:
        torch.save(state, temporary)
    for old in _newest_first(folder)[keep:]:
        if not (permanent_every and int(old.stem.removeprefix("step-")) % permanent_every == 0):
            old.unlink()


def load_newest(folder: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """Return the newest readable checkpoint, on the CPU, and a sentence per unreadable newer one.

    None if there is no readable one. Checksums are verified, and nothing but tensors and plain
    values is unpickled. Raises UserError for one that another version of steepest wrote.
    """
    warnings: list[str] = []
    for path in _newest_first(folder):
        try:
            state = _read(path)
        except UserError as error:
            warnings.append(str(error))
        else:
            return _of_this_schema(state, path), warnings
    return None, warnings


def load(path: Path) -> dict[str, Any]:
    """Return a checkpoint as `load_newest` does; raise UserError if it cannot be read."""
    return _of_this_schema(_read(path), path)


def _read(path: Path) -> dict[str, Any]:
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"{damaged} is damaged")
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (
        OSError,
        EOFError,
        KeyError,
        RuntimeError,
        ValueError,
        pickle.UnpicklingError,
        zipfile.BadZipFile,
    ) as error:
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"The checkpoint {path.name} could not be read ({first_line}).") from error
    return state


def _of_this_schema(state: dict[str, Any], path: Path) -> dict[str, Any]:
    if (schema := state.get("schema")) != SCHEMA:
        raise UserError(
            f"The checkpoint {path} has schema {schema}, and this version of steepest reads schema "
            f"{SCHEMA}; use the version that wrote it, or remove the checkpoint to begin anew."
        )
    return state


def newest(folder: Path) -> Path | None:
    """Return the file of the newest checkpoint, None if there is none."""
    return next(iter(_newest_first(folder)), None)


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


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*.pt"), reverse=True)
