"""Short causal convolutions over time, one for each channel."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ShortConvolution(nn.Conv1d):
    """silu of a causal convolution of each channel alone, without bias (arXiv:2406.06484).

    The weight is [channels, 1, width]; its last tap is the present. Input and output are
    [batch, time, channels]. With `segments` (see `steepest.models.documents`) a token sees those of
    its own document alone.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__(channels, channels, width, groups=channels, bias=False)

    def reset_parameters(self) -> None:
        """Leave the values alone: torch's own draw would use global random state."""

    def forward(self, x: Tensor, segments: Tensor | None = None) -> Tensor:
        return F.silu(convolve(x, self.weight.squeeze(1), segments)).to(x.dtype)


def convolve(x: Tensor, weight: Tensor, segments: Tensor | None = None) -> Tensor:
    """Return y_t = sum over lags of weight[:, -1 - lag] x_{t - lag}, in float32 at least.

    x is [batch, time, channels], weight [channels, width], segments [batch, time].
    """
    exact = torch.promote_types(x.dtype, torch.float32)
    time, taps = x.shape[1], weight.to(exact).flip(1).unbind(1)
    y = x * taps[0]
    for lag, tap in enumerate(taps[1:], start=1):
        earlier = F.pad(x, (0, 0, lag, 0))[:, :time]
        if segments is not None:
            same = F.pad(segments, (lag, 0))[:, :time] == segments
            earlier = earlier * same[..., None]
        y = y + earlier * tap
    return y
