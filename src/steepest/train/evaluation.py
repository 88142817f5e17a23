"""The held-out loss."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

import steepest
from steepest import data
from steepest.data.tokens import Tokens
from steepest.models import Llama
from steepest.train.config import RunConfig


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Return the context of a forward pass: bfloat16 autocast, or nothing for float32."""
    if precision == "bfloat16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


@torch.no_grad()
def evaluate(model: Llama, tokens: Tokens, config: RunConfig, device: torch.device) -> float:
    """Return the mean loss in nats per token over the first `eval_tokens` held-out tokens.

    Every token weighs the same, also in a smaller last batch; the sum is in float64. The model is
    in evaluation mode meanwhile.
    """
    batches = data.validation_batches(
        tokens,
        batch_size=config.data.batch_size // config.training.gradient_accumulation,
        sequence_length=config.data.sequence_length,
        max_tokens=config.training.eval_tokens,
    )
    total = torch.zeros((), dtype=torch.float64, device=device)
    count = 0
    model.eval()
    for inputs, targets in batches:
        with autocast(config.training.precision, device):
            loss = model.loss(inputs.to(device), targets.to(device))
        total += loss.double() * targets.numel()
        count += targets.numel()
    model.train()
    return float(total) / count


@contextmanager
def evaluation_weights(model: Llama, optimizer: torch.optim.Optimizer) -> Iterator[None]:
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
