"""LLaMA: a decoder with RMSNorm, rotary positions and SwiGLU (arXiv:2302.13971)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from steepest.errors import UserError
from steepest.models.config import LlamaConfig
from steepest.models.rotary import Rotary

RESIDUAL_OUTPUTS = ("o_proj.weight", "down_proj.weight")
# Up to this length the CPU kernel of scaled_dot_product_attention is faster in float32 than in
# bfloat16, most of all backward (5 times at 128 positions and heads of 16); at 512 it is slower.
CPU_FLOAT32_ATTENTION_LENGTH = 256
# Logits of this many tokens at a time stay in the CPU's cache: 20 % off the head and loss of a
# small model.
CPU_LOSS_CHUNK = 256


class Linear(nn.Linear):
    """A matrix without bias; `Llama.reset_parameters` draws its values."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def reset_parameters(self) -> None:
        """Leave the values alone: torch's own draw would use global random state."""


class Embedding(nn.Embedding):
    """A table of token vectors; `Llama.reset_parameters` draws its values."""

    def reset_parameters(self) -> None:
        """Leave the values alone: torch's own draw would use global random state."""


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in float32 (Zhang and Sennrich, 2019, arXiv:1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.float()
        return F.rms_norm(x.float(), weight.shape, weight, self.eps).to(x.dtype)


class Attention(nn.Module):
    """Causal attention; query, key and value stay separate matrices, as optimizers want them."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.head_size = config.head_size
        self.grouped = config.key_value_heads != config.heads
        key_value = config.key_value_heads * config.head_size
        self.q_proj = Linear(config.hidden_size, config.hidden_size)
        self.k_proj = Linear(config.hidden_size, key_value)
        self.v_proj = Linear(config.hidden_size, key_value)
        self.o_proj = Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, rotary: Rotary) -> Tensor:
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_size)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        short = x.shape[1] <= CPU_FLOAT32_ATTENTION_LENGTH
        dtype = torch.float32 if x.device.type == "cpu" and short else v.dtype
        with torch.autocast(x.device.type, enabled=False):
            y = F.scaled_dot_product_attention(
                rotary(q).to(dtype),
                rotary(k).to(dtype),
                v.to(dtype),
                is_causal=True,
                enable_gqa=self.grouped,
            )
        output: Tensor = self.o_proj(y.transpose(1, 2).flatten(-2).to(v.dtype))
        return output


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (Shazeer, 2020, arXiv:2002.05202)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return output


class Layer(nn.Module):
    """One block: attention, then MLP, each on the normalised residual stream."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rotary: Rotary) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rotary)
        output: Tensor = x + self.mlp(self.mlp_norm(x))
        return output


class Llama(nn.Module):
    """A LLaMA language model whose initial weights are those of `generator` (default: seed 0)."""

    def __init__(self, config: LlamaConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        self.rotary = Rotary(config.head_size, config.max_sequence_length, config.rope_theta)
        if config.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        if self.norm.weight.device.type != "meta":
            self.reset_parameters(generator or torch.Generator().manual_seed(0))

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        """Draw the initial weights: normal with deviation init_std, gains 1.

        The outputs of attention and MLP, 2 * layers in all, get init_std / sqrt(2 * layers), so
        that the residual stream starts at the same size at any depth (Radford et al., 2019). Values
        are drawn in float32 on the generator's device: with a CPU generator they depend on its seed
        alone, not on the device or dtype of the model.
        """
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0)
                continue
            residual = name.endswith(RESIDUAL_OUTPUTS)
            std = self.config.init_std / (math.sqrt(2 * self.config.layers) if residual else 1)
            values = torch.empty(parameter.shape, dtype=torch.float32, device=generator.device)
            parameter.copy_(values.normal_(0.0, std, generator=generator))
        self.rotary.reset_parameters()

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits [batch, time, vocab] of the next token for int64 tokens [batch, time].

        Raises UserError when the sequence is longer than the config's max_sequence_length.
        """
        logits: Tensor = self.lm_head(self._hidden(tokens))
        return logits

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy in nats per token, float32, of int64 [batch, time]."""
        hidden = self._hidden(tokens).flatten(0, 1)
        chunk = CPU_LOSS_CHUNK if hidden.device.type == "cpu" else hidden.shape[0]
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for rows, labels in zip(
            torch.split(hidden, chunk), torch.split(targets.flatten(), chunk), strict=True
        ):
            logits = self.lm_head(rows).float()
            total = total + F.cross_entropy(logits, labels, reduction="sum")
        return total / targets.numel()

    def _hidden(self, tokens: Tensor) -> Tensor:
        """Return the normalised last hidden states [batch, time, hidden]."""
        if tokens.shape[1] > self.config.max_sequence_length:
            raise UserError(
                f"A sequence of {tokens.shape[1]} tokens is longer than the model's "
                f"max_sequence_length of {self.config.max_sequence_length}."
            )
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x, self.rotary)
        output: Tensor = self.norm(x)
        return output
