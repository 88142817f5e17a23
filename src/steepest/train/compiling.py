"""The training objective of a run, compiled if asked and possible."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from steepest.models import LanguageModel, Loss
from steepest.train.config import RunConfig
from steepest.train.parallel import Parallel
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
    model: LanguageModel, config: RunConfig, device: torch.device, parallel: Parallel, *, rows: int
) -> tuple[nn.Module, list[str]]:
    """Return what training minimises, and what went wrong in compiling it, if it did.

    With `training.compile` the forward and backward pass of so many rows are compiled here, outside
    the time of the first step, as `parallel` has them. Where that fails, mostly for want of a C++
    compiler, the objective stays eager, and there is a sentence that says so.
    """
    objective = Objective(model, config.training.z_loss)
    wrapped = parallel.wrap(objective)
    if not config.training.compile:
        return wrapped, []
    from torch._dynamo.exc import TorchDynamoException

    eager = objective.forward
    objective.forward = torch.compile(eager, dynamic=False)  # type: ignore[method-assign]
    try:
        # Replicas compile each by itself; shards cannot, and would keep gradients held back.
        with parallel.accumulating(last=parallel.in_step):
            with autocast(config.training.precision, device):
                loss = wrapped(*_sample(config, device, rows))
            loss.objective.backward()
    except TorchDynamoException as error:
        cause = str(error).strip().splitlines()[0]
        objective.forward = eager  # type: ignore[method-assign]
        return wrapped, [f"torch.compile failed, so this run is not compiled ({cause})."]
    finally:
        model.zero_grad(set_to_none=True)
    return wrapped, []


def _sample(
    config: RunConfig, device: torch.device, rows: int
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Return inputs of the objective in the shapes of the run."""
    shape = (rows, config.data.sequence_length)
    tokens = torch.zeros(shape, dtype=torch.int64, device=device)
    packed = config.data.packing == "documents"
    documents = torch.zeros(shape, dtype=torch.int32, device=device) if packed else None
    # A graph of one tensor would be compiled again for two.
    return tokens, tokens.clone(), documents, torch.ones((), device=device)
