"""GPT-2: a decoder with learned positions, LayerNorm and a GELU MLP (Radford et al., 2019)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from steepest.errors import UserError
from steepest.models import documents as packed
from steepest.models.attention import Mask, attend, document_mask
from steepest.models.language_model import Features, LanguageModel
from steepest.models.layers import Embedding, LayerNorm, Linear, scaled
from steepest.models.mup import MuPConfig


@dataclass(frozen=True)
class GPT2Config(MuPConfig):
    """Shape of a GPT-2 model. Raises UserError when a value is impossible."""

    architecture: Literal["gpt2"] = "gpt2"
    """Which model this is the config of."""
    heads: int = 4
    """Attention heads; each has hidden_size / heads channels."""
    intermediate_size: int | None = None
    """Channels inside the MLP; 4 times hidden_size if not given."""
    bias: bool = False
    """Give matrices and norms biases, as OpenAI's weights have them."""
    activation: Literal["gelu", "gelu_tanh"] = "gelu"
    """Exact GELU, or its approximation by tanh, as in OpenAI's code."""
    parallel_block: bool = False
    """Feed attention and MLP from one norm, side by side."""
    tie_embeddings: bool = True
    """Let the head be the embedding table."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_counts("heads")
        if self.intermediate_size is not None:
            self.require_counts("intermediate_size")
        self.require_flags("bias", "parallel_block")
        self.require_one_of("activation", ("gelu", "gelu_tanh"))
        if self.hidden_size % self.heads != 0:
            raise UserError(
                f"Model hidden_size must be a multiple of heads, "
                f"but {self.hidden_size} is not a multiple of {self.heads}."
            )

    @property
    def head_size(self) -> int:
        """Channels of one attention head."""
        return self.hidden_size // self.heads

    @property
    def mlp_size(self) -> int:
        """Channels inside the MLP."""
        return 4 * self.hidden_size if self.intermediate_size is None else self.intermediate_size


class Attention(nn.Module):
    """Causal attention; query, key and value stay separate matrices, as optimizers want them."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.head_size = config.head_size
        self.scale = config.attention_scale(config.head_size)
        size = config.hidden_size
        self.q_proj = Linear(size, size, config.bias)
        self.k_proj = Linear(size, size, config.bias)
        self.v_proj = Linear(size, size, config.bias)
        self.o_proj = Linear(size, size, config.bias)

    def forward(self, x: Tensor, mask: Mask | None) -> Tensor:
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_size)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        y = attend(q, k, v, mask, self.scale)
        output: Tensor = self.o_proj(y.transpose(1, 2).flatten(-2))
        return output


class MLP(nn.Module):
    """down(gelu(up(x)))."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.approximate = "tanh" if config.activation == "gelu_tanh" else "none"
        self.up_proj = Linear(config.hidden_size, config.mlp_size, config.bias)
        self.down_proj = Linear(config.mlp_size, config.hidden_size, config.bias)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.down_proj(F.gelu(self.up_proj(x), approximate=self.approximate))
        return output


class Layer(nn.Module):
    """One block: attention, then MLP, or both side by side on one norm."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.branch_scale = config.branch_scale
        self.attention_norm = LayerNorm(config.hidden_size, config.norm_eps, config.bias)
        self.attention = Attention(config)
        self.mlp_norm = (
            None
            if config.parallel_block
            else LayerNorm(config.hidden_size, config.norm_eps, config.bias)
        )
        self.mlp = MLP(config)

    def forward(self, x: Tensor, mask: Mask | None) -> Tensor:
        y = self.attention_norm(x)
        x = x + scaled(self.attention(y, mask), self.branch_scale)
        if self.mlp_norm is not None:
            y = self.mlp_norm(x)
        return x + scaled(self.mlp(y), self.branch_scale)


class GPT2(LanguageModel):
    """A GPT-2 language model whose initial weights are those of `generator` (default: seed 0)."""

    embeddings = (*LanguageModel.embeddings, "embed_positions.")
    residual_outputs = ("o_proj.weight", "down_proj.weight")
    config: GPT2Config

    def __init__(self, config: GPT2Config, generator: torch.Generator | None = None) -> None:
        super().__init__(config)
        self.embed_positions = Embedding(config.max_sequence_length, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = LayerNorm(config.hidden_size, config.norm_eps, config.bias)
        self.complete(generator)

    @property
    def logit_scale(self) -> float:
        """1 over the width factor of muP."""
        return 1 / self.config.width_factor

    def features(self, tokens: Tensor, documents: Tensor | None = None) -> Features:
        """Return the last hidden states; see `LanguageModel.features`."""
        mask = document_mask(documents, self.config.head_size)
        if documents is None:
            places = torch.arange(tokens.shape[1], device=tokens.device)
        else:
            places = packed.positions(documents)
        x = self.embed(tokens)
        x = x + self.embed_positions(places).to(x.dtype)
        x = scaled(x, self.config.embedding_scale)
        for layer in self.layers:
            x = self.through(layer, x, mask)
        return Features(self.norm(x), None, {})
