"""steepest finds out which optimizer trains language models best.

>>> import steepest
>>> optimizer = steepest.create("muon", model, lr=0.02, adam_lr=3e-3)
>>> steepest.names()
>>> steepest.describe("muon")
"""

from steepest.optim import (
    NamedRole,
    Optimizer,
    Role,
    Rule,
    create,
    describe,
    int8_weights,
    names,
    presets,
    roles,
)

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
