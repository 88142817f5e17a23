"""The training objective of a run, compiled if asked and possible."""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn

from steepest.models import LanguageModel, Loss
from steepest.train.config import RunConfig
from steepest.train.precision import autocast


class Objective(nn.Module):
    """What training minimises, as a module, which DistributedDataParallel takes."""

    def __init__(self, model: LanguageModel, z_loss: float) -> None:
        super().__init__()
        self.model, self.z_loss = model, z_loss

    def forward(
        self, tokens: Tensor, targets: Tensor, documents: Tensor | None, tokens_in_batch: Tensor
    ) -> Loss:
        """Return the loss of int64 tokens and targets [batch, time]; see `LanguageModel`."""
        return self.model.objective(
            tokens, targets, documents, tokens_in_batch=tokens_in_batch, z_loss=self.z_loss
        )


def objective_function(
    model: LanguageModel, config: RunConfig, device: torch.device
) -> tuple[Objective, list[str]]:
    """Return what training minimises, and what went wrong in compiling it, if it did.

    With `training.compile` the forward and backward pass are compiled here, outside the time of the
    first step. Where that fails, mostly for want of a C++ compiler, the eager objective is returned
    with a sentence that says so.
    """
    objective = Objective(model, config.training.z_loss)
    if not config.training.compile:
        return objective, []
    from torch._dynamo.exc import TorchDynamoException

    eager = objective.forward
    objective.forward = torch.compile(eager, dynamic=False)  # type: ignore[method-assign]
    try:
        with autocast(config.training.precision, device):
            loss = objective(*_sample(config, device))
        loss.objective.backward()
    except TorchDynamoException as error:
        cause = str(error).strip().splitlines()[0]
        warning = f"torch.compile failed, so this run is not compiled ({cause})."
        logging.getLogger("steepest").warning(warning)
        objective.forward = eager  # type: ignore[method-assign]
        return objective, [warning]
    finally:
        model.zero_grad(set_to_none=True)
    return objective, []


def _sample(
    config: RunConfig, device: torch.device
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Return inputs of the objective in the shapes of the run."""
    rows = config.data.batch_size // config.training.gradient_accumulation
    shape = (rows, config.data.sequence_length)
    tokens = torch.zeros(shape, dtype=torch.int64, device=device)
    packed = config.data.packing == "documents"
    documents = torch.zeros(shape, dtype=torch.int32, device=device) if packed else None
    return tokens, tokens, documents, torch.ones((), device=device)
