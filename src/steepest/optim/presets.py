"""Tuned hyperparameters by name, each with its source."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from types import MappingProxyType
from typing import Any

from steepest.errors import UserError, unknown


@dataclass(frozen=True)
class Preset:
    """Hyperparameters of one optimizer that somebody tuned for one setting."""

    name: str
    optimizer: str
    source: str
    """Where the values are from: paper or repository, and the file or table in it."""
    setting: str
    """What they were tuned for: model, data, batch, steps, schedule, clipping, precision."""
    hyperparameters: Mapping[str, Any]
    """By the names of `steepest.describe`."""
    wrap: tuple[str, ...] = ()
    """Wrappers around the rule, innermost first, as for `steepest.create`."""
    note: str = ""
    """How values were converted, and what the source does otherwise; empty if nothing."""


def presets(optimizer: str) -> dict[str, Preset]:
    """Return the presets of an optimizer by name; none for a name that has none.

    >>> presets("adamw")["fineweb-124m"].hyperparameters["betas"]
    (0.8, 0.999)
    """
    return dict(_load().get(optimizer, {}))


def preset(optimizer: str, name: str) -> Preset:
    """Return one preset. Raises UserError with the nearest name if there is none of that name."""
    found = presets(optimizer)
    if not found:
        raise UserError(f"There are no presets of {optimizer}; give its hyperparameters instead.")
    if name not in found:
        raise unknown(f"preset of {optimizer}", name, found)
    return found[name]


def tuned() -> list[str]:
    """Return the optimizers that have presets, in the order of the file."""
    return list(_load())


@cache
def _load() -> dict[str, dict[str, Preset]]:
    text = resources.files("steepest.optim").joinpath("presets.toml").read_text("utf-8")
    return {
        optimizer: {name: _preset(optimizer, name, entry) for name, entry in entries.items()}
        for optimizer, entries in tomllib.loads(text).items()
    }


def _preset(optimizer: str, name: str, entry: Mapping[str, Any]) -> Preset:
    """Return an entry of the file: its lists are tuples, its texts in one line."""
    return Preset(
        name,
        optimizer,
        source=" ".join(entry["source"].split()),
        setting=" ".join(entry["setting"].split()),
        hyperparameters=MappingProxyType(
            {
                key: tuple(value) if isinstance(value, list) else value
                for key, value in entry["hyperparameters"].items()
            }
        ),
        wrap=tuple(entry.get("wrap", ())),
        note=" ".join(entry.get("note", "").split()),
    )
