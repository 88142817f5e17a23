"""Optimizers as pure rules, and the engine that runs them."""

from steepest.optim.catalogue import Description, create, describe, names
from steepest.optim.optimizer import Optimizer
from steepest.optim.roles import NamedRole, Role, roles
from steepest.optim.rule import Hyper, Rule, State, Wrapper, ema

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
    "roles",
]
