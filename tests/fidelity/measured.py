"""The errors that the fidelity tests measure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

ERRORS: dict[tuple[str, str], tuple[float, str]] = {}
"""(optimizer, comparison) -> largest error, and what there is to know about it."""


def displacement_error(
    ours: Sequence[np.ndarray],
    theirs: Sequence[np.ndarray],
    start: Sequence[np.ndarray],
    roundings: int = 0,
) -> float:
    """Return the largest ||(p - p0) - (q - q0)|| / ||q - q0|| of the tensors; NaN stays NaN.

    Storing a parameter in float32 rounds it at every step, whatever the method: what as many
    independent `roundings` of half a unit in the last place add up to is taken off.
    """
    errors = []
    for p, q, p0 in zip(ours, theirs, start, strict=True):
        moved = np.linalg.norm(q - p0)
        error = np.linalg.norm(np.asarray(p, np.float64) - q)
        error = error - 2.0**-24 * np.sqrt(roundings) * np.linalg.norm(q)
        errors.append(error / moved if moved > 0 else error)
    return float(np.max(errors))


def record(optimizer: str, comparison: str, error: float, note: str = "") -> float:
    """Keep the error for the table, and return it."""
    key = (optimizer, comparison)
    ERRORS[key] = (max(ERRORS.get(key, (0.0, ""))[0], error), note)  # 0: nothing but rounding
    return error


def table() -> list[str]:
    """Return a line per optimizer and comparison."""
    return [
        f"{name:20} {what:56} {error:.1e}" for (name, what), (error, _) in sorted(ERRORS.items())
    ]


def write(path: Path) -> None:
    """Write every optimizer's largest error per comparison, to two digits, as JSON."""
    kept: dict[str, list[dict[str, object]]] = {}
    for (case, comparison), (error, note) in sorted(ERRORS.items()):
        optimizer, _, label = case.partition(" ")
        entry = {"comparison": comparison, "case": label, "error": float(f"{error:.1e}")}
        kept.setdefault(optimizer, []).append(entry | ({"note": note} if note else {}))
    path.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n", encoding="utf-8")
