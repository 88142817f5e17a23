"""Optimizers as pure rules, and the engine that runs them."""

from steepest.optim.catalogue import Description, describe, names
from steepest.optim.create import create
from steepest.optim.live import Hyper
from steepest.optim.optimizer import Optimizer
from steepest.optim.presets import presets
from steepest.optim.roles import NamedRole, Role, roles
from steepest.optim.rule import Rule, State, Wrapper, ema

__all__ = [
    "Description",
    "Hyper",
    "NamedRole",
    "Optimizer",
    "Role",
    "Rule",
    "State",
    "Wrapper",
    "create",
    "describe",
    "ema",
    "names",
    "presets",
    "roles",
]
