"""A model's weights in int8, where the optimizer of the run is one that steps them there."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

import steepest
from steepest.errors import UserError
from steepest.optim import catalogue
from steepest.train.config import OptimizerConfig
from steepest.train.identity import is_class
from steepest.train.optimizers import load_class
from steepest.train.parallel import Parallel


def store(
    model: nn.Module, config: OptimizerConfig, parallel: Parallel, wrap: Sequence[str] = ()
) -> None:
    """Store the model's hidden matrices in int8 if the optimizer rounds to it; call it first.

    An optimizer that is wrapped, by its config or in `wrap`, steps floats. Raises UserError where
    FSDP would have to shard codes, and as `steepest.int8_weights` does.
    """
    rule = _rule(config.name)
    if rule is None or not rule.rounds_to_int8 or config.wrap or wrap:
        return
    if parallel.in_step:
        raise UserError(
            f"{config.name} keeps weights in int8, which FSDP cannot shard; set runtime.parallel "
            "to ddp."
        )
    group_size = config.options.get("group_size", rule.hyperparameters()["group_size"])
    assert isinstance(group_size, int)
    steepest.int8_weights(model, group_size=group_size)


def _rule(name: str) -> steepest.Rule | None:
    if not is_class(name):
        return catalogue.recipe(name).rule
    cls = load_class(name)[0]
    return cls(lr=1.0) if issubclass(cls, steepest.Rule) else None
