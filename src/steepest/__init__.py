"""steepest finds out which optimizer trains language models best.

>>> import steepest
>>> optimizer = steepest.create("muon", model, lr=0.02, adam_lr=3e-3)
>>> steepest.names()
>>> steepest.describe("muon")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from steepest.optim import NamedRole, Optimizer, Role, Rule, describe, int8_weights, names
    from steepest.optim.create import create
    from steepest.optim.presets import presets
    from steepest.optim.roles import roles

__version__ = "0.1.0"

__all__ = [
    "NamedRole",
    "Optimizer",
    "Role",
    "Rule",
    "create",
    "describe",
    "int8_weights",
    "names",
    "presets",
    "roles",
]


if not TYPE_CHECKING:  # which would take any name for one that there is

    def __getattr__(name: str) -> Any:
        """Import the optimizers when one is first used; the command line's help needs no torch."""
        if name not in (*__all__, "optim"):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        optim = import_module("steepest.optim")
        return optim if name == "optim" else getattr(optim, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "optim"})
