"""What the optimizers are tried on: a tiny LLaMA with rare tokens, and fixed gradients."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from steepest.models import Llama, LlamaConfig

TINY = {"vocab_size": 64, "hidden_size": 32, "layers": 2, "heads": 2, "intermediate_size": 48}

SHAPES: tuple[tuple[int, ...], ...] = (
    (),
    (1,),
    (7,),
    (8, 8),
    (12, 5),
    (5, 12),
    (12, 5),
    (1, 9),
    (9, 1),
    (3, 40),
    (6, 2, 3, 3),
)
"""One shape twice, scalars, single rows and columns, very wide, and a convolution kernel."""


def llama(dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Llama:
    """Return a LLaMA of some 20 thousand parameters, seeded."""
    model = Llama(LlamaConfig(**{**TINY, **changes}), torch.Generator().manual_seed(seed))
    return model.to(dtype)


def batches(count: int = 5, rows: int = 2, length: int = 13) -> list[tuple[Tensor, Tensor]]:
    """Return fixed batches of Zipf-distributed tokens: most rows of the table see none."""
    rng = np.random.default_rng(1)
    odds = 1 / np.arange(1, TINY["vocab_size"] + 1) ** 1.3
    drawn = rng.choice(TINY["vocab_size"], size=(count, rows, length), p=odds / odds.sum())
    tokens = torch.from_numpy(drawn)
    return [(b[:, :-1], b[:, 1:]) for b in tokens]


def backward(model: Llama, batch: tuple[Tensor, Tensor]) -> float:
    """Leave the gradients of the next-token loss in the model; return the loss."""
    model.zero_grad(set_to_none=True)
    loss = model.loss(*batch)
    loss.backward()
    return loss.item()


def parameters(
    dtype: torch.dtype = torch.float32, shapes: Sequence[tuple[int, ...]] = SHAPES, seed: int = 0
) -> list[nn.Parameter]:
    """Return seeded parameters of these shapes."""
    rng = torch.Generator().manual_seed(seed)
    return [nn.Parameter(0.5 * torch.randn(s, generator=rng).to(dtype)) for s in shapes]


def stream(
    steps: int, shapes: Sequence[tuple[int, ...]] = SHAPES, seed: int = 7
) -> Iterator[list[Tensor]]:
    """Yield float32 gradients with a common part, whose sizes differ from tensor to tensor."""
    rng = torch.Generator().manual_seed(seed)
    common = [torch.randn(s, generator=rng) for s in shapes]
    for _ in range(steps):
        noise = [torch.randn(s, generator=rng) for s in shapes]
        yield [
            10.0 ** (i % 4 - 2) * (c + n)
            for i, (c, n) in enumerate(zip(common, noise, strict=True))
        ]


def set_gradients(params: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    """Give each parameter a copy of its gradient in its dtype."""
    for p, g in zip(params, grads, strict=True):
        p.grad = g.to(p.dtype).clone()


def with_roles(params: Sequence[Tensor]) -> list[dict[str, Any]]:
    """Return parameter groups: matrices hidden, the others vectors."""
    return [
        {"params": [p for p in params if p.ndim >= 2], "role": "hidden"},
        {"params": [p for p in params if p.ndim < 2], "role": "vector"},
    ]


def constant(step: int) -> float:
    """Return the multiplier of a constant learning rate."""
    return 1.0


def cosine(step: int) -> float:
    """Return the multiplier of a cosine after 5 steps of warm-up, from step 0."""
    return (step + 1) / 5 if step < 5 else 0.1 + 0.45 * (1 + math.cos(math.pi * (step - 5) / 35))


def named_roles(model: nn.Module) -> dict[str, tuple[Tensor, str]]:
    """Return a LLaMA's parameters with the role that their names imply."""

    def role(name: str, p: Tensor) -> str:
        if p.ndim < 2:
            return "vector"
        if "embed" in name:
            return "embedding"
        return "head" if "lm_head" in name else "hidden"

    return {name: (p, role(name, p)) for name, p in model.named_parameters()}
