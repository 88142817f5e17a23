"""Hyperparameters: what each name means, which values it takes, and their one form."""

from __future__ import annotations

import math
import numbers
import tomllib
from collections.abc import Hashable
from dataclasses import dataclass
from importlib import resources
from typing import Any

import torch
from torch import Tensor

from steepest.errors import UserError

MEANINGS: dict[str, str] = tomllib.loads(
    resources.files("steepest.optim").joinpath("meanings.toml").read_text("utf-8")
)
"""What each hyperparameter means, in a line."""


@dataclass(frozen=True)
class Limits:
    """The values a number may have: from `low`, up to but without `high`."""

    low: float = 0.0
    high: float = math.inf
    finite: bool = True

    def __contains__(self, value: float) -> bool:
        return self.low <= value < self.high or (value == math.inf and not self.finite)

    def __str__(self) -> str:
        return f"at least {self.low:g}" + (
            "" if self.high == math.inf else f" and below {self.high:g}"
        )


FRACTION = Limits(high=1.0)
COUNT = Limits(low=1)
LIMITS = {
    "betas": FRACTION,
    "gammas": FRACTION,
    "alpha_warmup": COUNT,
    "beta3_warmup": COUNT,
    "beta1": FRACTION,
    "beta2": FRACTION,
    "iterations": COUNT,
    "momentum": FRACTION,
    "shampoo_beta": FRACTION,
    "ns_steps": COUNT,
    "update_interval": COUNT,
    "max_precond_dim": COUNT,
    "max_size_triangular": COUNT,
    "start_preconditioning_step": COUNT,
    "n_clusters": Limits(low=1, high=257),
    "recluster_interval": COUNT,
    "beta3": FRACTION,
    "lookahead_update_interval": COUNT,
    "growth_limit": Limits(low=1.0),
    "growth_rate": Limits(low=1.0, finite=False),
    "block_size": COUNT,
    "rank": COUNT,
    "projection_bits": Limits(low=1, high=9),
    "group_size": COUNT,
    "queue_size": COUNT,
}
"""Limits by name; other numbers are at least 0 and finite."""

DTYPES = ("bfloat16", "float16", "float32", "float64")
"""The values of hyperparameters whose name ends in dtype; others are made by `rule.one_of`."""


def normal(
    rule: str,
    name: str,
    value: Any,
    default: Any,
    runs: int | None,
    *,
    choices: tuple[str, ...] = (),
) -> Any:
    """Return a hyperparameter in the form of its default: 1 is 1.0, a list is a tuple.

    With `runs`, a float may be a 1-D tensor of that many values. `choices` are the values that a
    text may have, if it may not have any. Raises UserError where the value is of another kind than
    the default, or out of its limits.
    """
    choices = DTYPES if name.endswith("dtype") else choices
    if isinstance(default, tuple):
        if isinstance(value, (list, tuple)) and len(value) == len(default):
            pairs = zip(value, default, strict=True)
            return tuple(normal(rule, name, v, d, runs) for v, d in pairs)
    elif isinstance(default, (bool, str)):
        if type(value) is type(default) and (not choices or value in choices):
            return value
    elif default is None and (value is None or value in choices):
        return value
    elif isinstance(default, int) or (default is None and LIMITS.get(name) is COUNT):
        if type(value) is int:
            return int(_limited(rule, name, value))
    elif isinstance(value, Tensor) and value.ndim == 1:
        return _per_run(rule, name, value, runs)
    elif not isinstance(value, bool) and (
        isinstance(value, numbers.Real) or (isinstance(value, Tensor) and value.ndim == 0)
    ):
        return _limited(rule, name, float(value))
    kind = f"one of {', '.join(choices)}" if choices else f"like {default!r}"
    raise UserError(f"{name} of {rule} is {value!r}, but it must be {kind}.")


def hashable(value: Any) -> Hashable:
    """Return a value as one that can be compared and hashed: of a tensor, its numbers."""
    if isinstance(value, tuple):
        return tuple(map(hashable, value))
    found: Hashable = tuple(value.tolist()) if isinstance(value, Tensor) else value
    return found


def is_zero(value: object) -> bool:
    """Say whether a live hyperparameter is the number 0; one per run is not."""
    return isinstance(value, float) and value == 0.0


def _limited(rule: str, name: str, value: float) -> float:
    limits = LIMITS.get(name, Limits())
    if value in limits:
        return value
    raise UserError(f"{name} of {rule} is {value:g}; it must be {limits}.")


def _per_run(rule: str, name: str, values: Tensor, runs: int | None) -> Tensor:
    if runs is None or len(values) != runs:
        wanted = "a number, as runs is not given" if runs is None else f"a number or {runs} of them"
        raise UserError(f"{name} of {rule} has {len(values)} values; it must be {wanted}.")
    for value in values.tolist():
        _limited(rule, name, value)
    return values.to("cpu", torch.float64)
