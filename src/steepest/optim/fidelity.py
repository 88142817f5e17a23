"""How close each optimizer is to its references, as the fidelity tests measured it."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from importlib import resources
from typing import Any


@dataclass(frozen=True)
class Comparison:
    """The largest relative error of displacements, ||(p - p0) - (q - q0)|| / ||q - q0||."""

    comparison: str
    """Precision, problem, and for an implementation of others its package and version."""
    case: str
    """Hyperparameters that were special."""
    error: float
    note: str = ""
    """What was set for both to mean the same, or why a larger error is the method's own."""

    @property
    def package(self) -> str:
        """Name and version of the package compared with, empty for the float64 transcription."""
        _, _, rest = self.comparison.partition(", ")
        return "" if rest.startswith(("LLaMA", "fixed")) else rest


def fidelity(optimizer: str) -> list[Comparison]:
    """Return the comparisons of an optimizer, none if it was not measured."""
    return [Comparison(**entry) for entry in _measured().get(optimizer, [])]


@functools.cache
def _measured() -> dict[str, list[dict[str, Any]]]:
    text = resources.files("steepest.optim").joinpath("fidelity.json").read_text("utf-8")
    found: dict[str, list[dict[str, Any]]] = json.loads(text)
    return found
