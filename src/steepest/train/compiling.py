"""The loss function of a run, compiled if asked and possible."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from steepest.models import LanguageModel
from steepest.train.config import RunConfig
from steepest.train.evaluation import autocast

LossFunction = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def loss_function(
    model: LanguageModel, config: RunConfig, device: torch.device
) -> tuple[LossFunction, list[str]]:
    """Return the model's loss on tokens and targets [batch, time], and what went wrong, if it did.

    With `training.compile` the forward and backward pass are compiled here, outside the time of the
    first step. Where that fails, mostly for want of a C++ compiler, the eager loss is returned with
    a sentence that says so.
    """
    if not config.training.compile:
        return model.loss, []
    from torch._dynamo.exc import TorchDynamoException

    compiled: LossFunction = torch.compile(model.loss, dynamic=False)
    parts = config.data.batch_size // config.training.gradient_accumulation
    tokens = torch.zeros(parts, config.data.sequence_length, dtype=torch.int64, device=device)
    try:
        with autocast(config.training.precision, device):
            loss = compiled(tokens, tokens)
        loss.backward()  # type: ignore[no-untyped-call]
    except TorchDynamoException as error:
        cause = str(error).strip().splitlines()[0]
        warning = f"torch.compile failed, so this run is not compiled ({cause})."
        logging.getLogger("steepest").warning(warning)
        return model.loss, [warning]
    finally:
        model.zero_grad(set_to_none=True)
    return compiled, []
