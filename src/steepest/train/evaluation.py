"""The held-out loss."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

import steepest
from steepest import data
from steepest.data import Batch
from steepest.data.splits import TokenSplit
from steepest.errors import UserError
from steepest.models import LanguageModel
from steepest.models.cross_entropy import IGNORED
from steepest.train.config import RunConfig
from steepest.train.parallel import Parallel
from steepest.train.precision import autocast


@dataclass(frozen=True)
class Score:
    """A loss over tokens that have been evaluated."""

    nats: float
    """Mean cross-entropy in nats per token."""
    bytes_per_token: float
    """UTF-8 bytes of text that a token stands for."""

    @property
    def perplexity(self) -> float:
        """The exponential of the loss; infinite where that is too large to say."""
        return math.exp(self.nats) if self.nats < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """The loss in bits per byte of text, which does not depend on the tokenizer."""
        return self.nats / math.log(2) / self.bytes_per_token


@torch.no_grad()
def evaluate(
    model: LanguageModel,
    split: TokenSplit,
    config: RunConfig,
    device: torch.device,
    *,
    tokens: int,
    parallel: Parallel | None = None,
) -> Score:
    """Return the loss over `tokens` tokens of a split, the same ones every time.

    Every target weighs the same, whatever the batch and the number of processes; the sum is in
    float64. The model is in evaluation mode meanwhile. Raises UserError if there is no target.
    """
    parallel = parallel or Parallel()
    batches = data.validation_batches(
        split,
        batch_size=config.data.batch_size // config.training.gradient_accumulation,
        sequence_length=config.data.sequence_length,
        max_tokens=tokens,
        packing=config.data.as_packing(),
        rank=parallel.rank,
        world_size=parallel.world_size,
    )
    total = torch.zeros(2, dtype=torch.float64, device=device)
    model.eval()
    for batch in _as_many(batches, parallel, config.data.sequence_length):
        moved = to_device(batch, device)
        with autocast(config.training.precision, device):
            loss = model.loss(moved.tokens, moved.targets, moved.documents)
        if count := int((batch.targets != IGNORED).sum()):
            total += torch.stack((loss.double() * count, torch.full_like(total[0], count)))
    model.train()
    _let_go(model)
    nats, count = parallel.sum(total).tolist()
    if not count:
        raise UserError(
            "None of the tokens to evaluate has one to predict; use a longer data.sequence_length "
            "or more evaluation.tokens."
        )
    return Score(nats / count, split.bytes_per_token)


def _let_go(model: nn.Module) -> None:
    """Let FSDP drop the weights it has gathered for a forward pass and keeps for a backward pass.

    Here comes none, and the next pass may be of others: those in training, or an average.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _as_many(batches: Iterator[Batch], parallel: Parallel, length: int) -> Iterator[Batch]:
    """Yield the batches; where processes step together, rows without targets make up the number."""
    if not parallel.in_step:
        yield from batches
        return
    nothing = torch.zeros(1, length, dtype=torch.int64)
    empty = Batch(nothing, torch.full_like(nothing, IGNORED), nothing.int())
    while True:
        batch = next(batches, None)
        if not parallel.any(batch is not None):
            return
        yield empty if batch is None else batch


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Copy a batch to the device without waiting for a GPU."""
    if device.type != "cuda":
        return batch
    moved = (
        None if part is None else part.pin_memory().to(device, non_blocking=True)
        for part in (batch.tokens, batch.targets, batch.documents)
    )
    tokens, targets, documents = moved
    assert tokens is not None
    assert targets is not None
    return Batch(tokens, targets, documents)


@contextmanager
def evaluation_weights(model: LanguageModel, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Give the model the weights its optimizer wants evaluated, and then the training weights.

    Optimizers such as schedule-free ones have an `eval()` that moves the weights and a `train()`
    that moves them back, up to rounding. The training weights are restored to the bit here, so that
    looking at a run does not change it.
    """
    if not has_modes(optimizer):
        yield
        return
    if isinstance(optimizer, steepest.Optimizer):  # It restores them to the bit itself.
        optimizer.eval()
        try:
            yield
        finally:
            optimizer.train()
        return
    parameters = list(model.parameters())
    saved = [parameter.detach().clone() for parameter in parameters]
    optimizer.eval()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        optimizer.train()  # type: ignore[attr-defined]
        with torch.no_grad():
            for parameter, value in zip(parameters, saved, strict=True):
                parameter.copy_(value)


def has_modes(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether the optimizer evaluates other weights than it trains."""
    if isinstance(optimizer, steepest.Optimizer):
        return optimizer.averages
    return callable(getattr(optimizer, "eval", None)) and callable(
        getattr(optimizer, "train", None)
    )
