"""Rotary position embeddings (Su et al., 2021, arXiv:2104.09864)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from steepest.models.documents import positions

Turns = tuple[Tensor, Tensor]
"""Cosines and sines of the angles, float32, to be broadcast over [batch, heads, time, half]."""


class Rotary(nn.Module):
    """Tables that turn channel pairs (i, i + head_size / 2) by position * theta^(-2i / head_size).

    The tables are not part of the state dict, and stay float32 when the model is cast to bfloat16:
    bfloat16 tables would blur neighbouring positions.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, head_size: int, max_length: int, theta: float) -> None:
        super().__init__()
        self.theta = theta
        table = torch.empty(max_length, head_size // 2, dtype=torch.float32)
        self.register_buffer("cos", table, persistent=False)
        self.register_buffer("sin", torch.empty_like(table), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fill the tables; needed again after `to_empty`."""
        length, half = self.cos.shape
        device = self.cos.device
        # The angles are computed in float64: in float32 those of late positions lose digits.
        exponents = torch.arange(half, dtype=torch.float64, device=device) / half
        places = torch.arange(length, dtype=torch.float64, device=device)
        angles = torch.outer(places, self.theta**-exponents)
        self.cos = angles.cos().float()
        self.sin = angles.sin().float()

    def forward(self, time: int, documents: Tensor | None = None) -> Turns:
        """Return the turns of positions 0 to time - 1, or of the positions in `documents`."""
        if documents is None:
            return self.cos[:time], self.sin[:time]
        places = positions(documents)[:, None]
        return self.cos[places], self.sin[places]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.cos.dtype != torch.float32:
            self.cos = self.cos.float()
            self.reset_parameters()
        return self


def turn(x: Tensor, turns: Turns) -> Tensor:
    """Rotate x [batch, heads, time, head_size]; the result is float32."""
    cos, sin = turns
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
