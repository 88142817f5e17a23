"""Optimizers as pure rules, and the engine that runs them."""

from steepest.optim.catalogue import Description, describe, names
from steepest.optim.create import create
from steepest.optim.int8 import Int8Weight, int8_weights
from steepest.optim.live import Hyper
from steepest.optim.optimizer import Optimizer
from steepest.optim.presets import presets
from steepest.optim.roles import NamedRole, Role, roles
from steepest.optim.rule import Rule, State, ema
from steepest.optim.wrapper import Wrapper

__all__ = [
    "Description",
    "Hyper",
    "Int8Weight",
    "NamedRole",
    "Optimizer",
    "Role",
    "Rule",
    "State",
    "Wrapper",
    "create",
    "describe",
    "ema",
    "int8_weights",
    "names",
    "presets",
    "roles",
]
