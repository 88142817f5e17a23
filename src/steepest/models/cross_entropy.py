"""Cross-entropy of a head's logits that never holds more than a chunk of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from steepest.models.layers import compute_dtype

IGNORED = -100
"""Target of a position that has no loss."""
CHUNK_TOKENS = {"cpu": 256, "cuda": 4096}
"""Tokens whose logits exist at a time: on a CPU they stay in its cache, which takes 20 % off the
head and loss of a small model."""
MOST_CHUNKS = 64
"""A compiled loss has the code of every chunk."""


def sums(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, scale: float = 1.0, z_loss: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Return sums over tokens: of the cross-entropy plus `z_loss` times the square of log Z,
    and of the cross-entropy alone, which has no gradient; both float32, 0-d, in nats.

    Logits are `scale` times hidden [tokens, channels] times weight [vocab, channels] transposed,
    in the dtype of autocast where that is on; targets int64 [tokens], -100 where there is no loss.
    log Z is the logarithm of the sum of the logits' exponentials, so `z_loss` is the coefficient of
    PaLM's auxiliary loss (Chowdhery et al., 2022, arXiv:2204.02311, section 5).

    The gradient is made in the forward pass, chunk by chunk, so that no logits are kept for the
    backward pass.
    """
    device, dtype = hidden.device.type, compute_dtype(hidden)
    tokens = max(CHUNK_TOKENS.get(device, 4096), -(-len(hidden) // MOST_CHUNKS))
    with torch.autocast(device, enabled=False):
        total, nats = _Sums.apply(  # type: ignore[no-untyped-call]
            hidden.to(dtype), weight, targets, (scale, z_loss, tokens)
        )
    return total, nats


class _Sums(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, how: tuple[float, float, int]
    ) -> tuple[Tensor, Tensor]:
        scale, z_loss, tokens = how
        differentiates = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        matrix = weight.to(hidden.dtype)
        exact = torch.promote_types(hidden.dtype, torch.float32)
        total = torch.zeros((), dtype=exact, device=hidden.device)
        nats = torch.zeros_like(total)
        grad_hidden = []
        grad_weight: Tensor | None = None
        for x, labels in zip(
            torch.split(hidden, tokens), torch.split(targets, tokens), strict=True
        ):
            logits = (x @ matrix.T).to(exact) * scale
            log_z = logits.logsumexp(-1, keepdim=True)
            counts = (labels != IGNORED)[:, None]
            index = labels.clamp(min=0)[:, None]
            chosen = torch.where(counts, log_z - logits.gather(1, index), 0).sum()
            nats = nats + chosen
            total = total + chosen
            if z_loss:
                total = total + z_loss * torch.where(counts, log_z, 0).square().sum()
            if not differentiates:
                continue
            slope = (logits - log_z).exp()
            if z_loss:
                slope = slope * (1 + 2 * z_loss * log_z)
            slope = slope.scatter_add(1, index, -torch.ones_like(log_z))
            slope = (torch.where(counts, slope, 0) * scale).to(hidden.dtype)
            grad_hidden.append(slope @ matrix)
            part = (slope.T @ x).to(exact)
            grad_weight = part if grad_weight is None else grad_weight + part
        if differentiates:
            assert grad_weight is not None
            ctx.save_for_backward(torch.cat(grad_hidden), grad_weight.to(weight.dtype))
        ctx.mark_non_differentiable(nats)
        return total, nats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight = ctx.saved_tensors
        slope = grads[0]
        return hidden * slope.to(hidden.dtype), weight * slope.to(weight.dtype), None, None
