"""Float64 NumPy transcriptions of the papers, one file per family."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from typing import Any


@functools.cache
def all_references() -> dict[str, type[Any]]:
    """Return every reference by the name of its optimizer or wrapper."""
    found: dict[str, type[Any]] = {}
    for module in pkgutil.iter_modules(__path__):
        found |= getattr(importlib.import_module(f"{__name__}.{module.name}"), "REFERENCES", {})
    return found


def find(name: str, wrap: tuple[str, ...] = ()) -> type[Any]:
    """Return the reference of an optimizer, with those of wrappers around it, innermost first."""
    kind = all_references()[name]
    for wrapper in wrap:
        kind = all_references()[wrapper].around(kind)
    return kind
