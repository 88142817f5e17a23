"""Models of linear attention: GLA, DeltaNet and Gated DeltaNet.

Each is LLaMA's block with a recurrence in the place of attention, and no positions: order is in the
recurrence. Details that the papers leave open are those of the library flash-linear-attention.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from steepest.models import documents as packed
from steepest.models.convolution import ShortConvolution
from steepest.models.language_model import Features, LanguageModel
from steepest.models.layers import Linear, RMSNorm, SwiGLU
from steepest.models.linear_attention_config import (
    DeltaNetConfig,
    GatedDeltaNetConfig,
    GLAConfig,
    LinearAttentionConfig,
)
from steepest.models.recurrences import delta_rule, gated_linear_attention

L2_EPS = 1e-6
"""Added to the squared norm of queries and keys."""
LARGEST_A = 16.0
"""A, the rate of decay of a head of Gated DeltaNet, is drawn from (0, 16], as in Mamba 2."""
STEP_SIZES = (1e-3, 1e-1)
"""softplus(dt_bias) is drawn from this range, evenly in the logarithm, as in Mamba 2."""


class Projections(nn.Module):
    """The matrices of query, key, value and output, and heads cut from their channels."""

    def __init__(self, config: LinearAttentionConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.keys, self.values = (
            config.heads * size for size in (config.key_size, config.value_size)
        )
        self.q_proj = Linear(config.hidden_size, self.keys)
        self.k_proj = Linear(config.hidden_size, self.keys)
        self.v_proj = Linear(config.hidden_size, self.values)
        self.o_proj = Linear(self.values, config.hidden_size)
        self.o_norm = RMSNorm(config.value_size, config.norm_eps)

    def split(self, x: Tensor) -> Tensor:
        """Turn [batch, time, channels] into [batch, time, heads, channels of a head]."""
        return x.reshape(*x.shape[:-1], self.heads, -1)


class GatedLinearAttention(Projections):
    """GLA (arXiv:2312.06635): every channel of the keys decays at its own rate.

    log decay = log sigmoid(a low-rank map of x) / gate_logit_normalizer
    output = o_proj(RMSNorm(GLA(q, k, v)) * silu(g_proj(x))), with the norm over each head.
    """

    def __init__(self, config: GLAConfig) -> None:
        super().__init__(config)
        self.gate_logit_normalizer = config.gate_logit_normalizer
        self.decay_in_proj = Linear(config.hidden_size, config.gate_rank)
        self.decay_out_proj = Linear(config.gate_rank, self.keys, bias=True)
        self.g_proj = Linear(config.hidden_size, self.values)

    def forward(self, x: Tensor, segments: Tensor | None) -> Tensor:
        q, k, v = (self.split(proj(x)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        logits = self.split(self.decay_out_proj(self.decay_in_proj(x)))
        log_decay = F.logsigmoid(logits.float()) / self.gate_logit_normalizer
        y = self.o_norm(gated_linear_attention(q, k, v, log_decay, segments))
        y = y * F.silu(self.split(self.g_proj(x)))
        output: Tensor = self.o_proj(y.flatten(-2))
        return output


class DeltaRule(Projections):
    """DeltaNet's layer (arXiv:2406.06484): what a key recalls is replaced.

    Queries, keys and values go through short convolutions and silu; queries and keys of a head have
    norm 1; beta = sigmoid(b_proj(x)) says how much of the old value gives way.
    """

    def __init__(self, config: DeltaNetConfig | GatedDeltaNetConfig) -> None:
        super().__init__(config)
        self.b_proj = Linear(config.hidden_size, config.heads)
        self.q_conv = ShortConvolution(self.keys, config.conv_size)
        self.k_conv = ShortConvolution(self.keys, config.conv_size)
        self.v_conv = ShortConvolution(self.values, config.conv_size)

    def forward(self, x: Tensor, segments: Tensor | None) -> Tensor:
        output: Tensor = self.o_proj(self.o_norm(self.recall(x, segments)).flatten(-2))
        return output

    def recall(self, x: Tensor, segments: Tensor | None, log_decay: Tensor | None = None) -> Tensor:
        """Return what the queries read, [batch, time, heads, value]."""
        q = normalized(self.split(self.q_conv(self.q_proj(x), segments)))
        k = normalized(self.split(self.k_conv(self.k_proj(x), segments)))
        v = self.split(self.v_conv(self.v_proj(x), segments))
        beta = self.b_proj(x).float().sigmoid()
        return delta_rule(q, k, v, beta, log_decay=log_decay, segments=segments)


class GatedDeltaRule(DeltaRule):
    """Gated DeltaNet's layer (arXiv:2412.06464): the state of a head also decays.

    log decay = -exp(A_log) softplus(a_proj(x) + dt_bias), and the output is gated as in GLA.
    """

    def __init__(self, config: GatedDeltaNetConfig) -> None:
        super().__init__(config)
        self.a_proj = Linear(config.hidden_size, config.heads)
        self.A_log = nn.Parameter(torch.empty(config.heads))
        self.dt_bias = nn.Parameter(torch.empty(config.heads))
        self.g_proj = Linear(config.hidden_size, self.values)

    def forward(self, x: Tensor, segments: Tensor | None) -> Tensor:
        logits = self.a_proj(x).float() + self.dt_bias.float()
        log_decay = self.A_log.float().exp() * F.logsigmoid(-logits)  # -softplus(logits)
        y = self.o_norm(self.recall(x, segments, log_decay))
        y = y * F.silu(self.split(self.g_proj(x)))
        output: Tensor = self.o_proj(y.flatten(-2))
        return output


def normalized(x: Tensor) -> Tensor:
    """Return vectors of norm 1 along the last dimension, computed in float32."""
    exact = x.float()
    return (exact * torch.rsqrt(exact.square().sum(-1, keepdim=True) + L2_EPS)).to(x.dtype)


class Layer(nn.Module):
    """One block: a recurrence, then MLP, each on the normalised residual stream."""

    def __init__(self, config: LinearAttentionConfig, attention: nn.Module) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = attention
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.mlp_size)

    def forward(self, x: Tensor, segments: Tensor | None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), segments)
        output: Tensor = x + self.mlp(self.mlp_norm(x))
        return output


class LinearAttentionModel(LanguageModel):
    """A language model of such blocks; its initial weights are those of `generator`, or seed 0."""

    residual_outputs = ("o_proj.weight", "down_proj.weight")
    attention: ClassVar[type[Projections]]
    config: LinearAttentionConfig

    def __init__(
        self, config: LinearAttentionConfig, generator: torch.Generator | None = None
    ) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(
            Layer(config, self.attention(config)) for _ in range(config.layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.complete(generator)

    def features(self, tokens: Tensor, documents: Tensor | None = None) -> Features:
        """Return the last hidden states; see `LanguageModel.features`."""
        segments = None if documents is None else packed.segments(documents)
        x = self.embed(tokens)
        for layer in self.layers:
            x = self.through(layer, x, segments)
        return Features(self.norm(x), None, {})


class GLA(LinearAttentionModel):
    """A model of gated linear attention."""

    attention = GatedLinearAttention


class DeltaNet(LinearAttentionModel):
    """A model of the delta rule."""

    attention = DeltaRule


class GatedDeltaNet(LinearAttentionModel):
    """A model of the delta rule with decay."""

    attention = GatedDeltaRule

    def draw(self, name: str, parameter: Tensor, generator: torch.Generator) -> None:
        """Give one parameter its initial values; those of the decay as in Mamba 2."""
        if not name.endswith(("A_log", "dt_bias")):
            super().draw(name, parameter, generator)
            return
        uniform = torch.empty(parameter.shape, device=generator.device).uniform_(
            generator=generator
        )
        if name.endswith("A_log"):
            parameter.copy_((LARGEST_A * (1 - uniform)).log())  # 1 - uniform is never 0
            return
        low, high = map(math.log, STEP_SIZES)
        step = (low + (high - low) * uniform).exp()
        parameter.copy_(step + (-torch.expm1(-step)).log())  # what softplus turns into step
