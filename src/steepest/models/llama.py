"""LLaMA: a decoder with RMSNorm, rotary positions and SwiGLU (arXiv:2302.13971)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from steepest.errors import UserError
from steepest.models.attention import Mask, attend, document_mask
from steepest.models.language_model import Features, LanguageModel
from steepest.models.layers import Linear, RMSNorm, SwiGLU, scaled
from steepest.models.mup import MuPConfig
from steepest.models.rotary import Rotary, Turns, turn


@dataclass(frozen=True)
class LlamaConfig(MuPConfig):
    """Shape of a LLaMA model (Touvron et al., 2023, arXiv:2302.13971).

    `kv_heads` below `heads` gives grouped-query attention (Ainslie et al., 2023,
    arXiv:2305.13245); None means as many as `heads`. Raises UserError when a value is impossible.
    """

    architecture: Literal["llama"] = "llama"
    """Which model this is the config of."""
    heads: int = 4
    """Attention heads; each has hidden_size / heads channels."""
    kv_heads: int | None = None
    """Heads of keys and values; as many as heads if not given."""
    intermediate_size: int = 176
    """Channels inside the MLP."""
    rope_theta: float = 10_000.0
    """Base of the wavelengths of the rotary positions."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_counts("heads", "intermediate_size")
        if self.kv_heads is not None:
            self.require_counts("kv_heads")
        self.require_positive("rope_theta")
        if self.hidden_size % (2 * self.heads) != 0:
            raise UserError(
                f"Model hidden_size must be an even multiple of heads (rotary embeddings turn "
                f"pairs of channels), but {self.hidden_size} is not a multiple of {2 * self.heads}."
            )
        if self.heads % self.key_value_heads != 0:
            raise UserError(
                f"Model heads must be a multiple of kv_heads, "
                f"but {self.heads} is not a multiple of {self.key_value_heads}."
            )

    @property
    def head_size(self) -> int:
        """Channels of one attention head."""
        return self.hidden_size // self.heads

    @property
    def key_value_heads(self) -> int:
        """Heads of the keys and values: `kv_heads`, or `heads` when that is None."""
        return self.heads if self.kv_heads is None else self.kv_heads


class Attention(nn.Module):
    """Causal attention; query, key and value stay separate matrices, as optimizers want them."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.head_size = config.head_size
        self.scale = config.attention_scale(config.head_size)
        key_value = config.key_value_heads * config.head_size
        self.q_proj = Linear(config.hidden_size, config.hidden_size)
        self.k_proj = Linear(config.hidden_size, key_value)
        self.v_proj = Linear(config.hidden_size, key_value)
        self.o_proj = Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, turns: Turns, mask: Mask | None) -> Tensor:
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_size)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        y = attend(turn(q, turns), turn(k, turns), v, mask, self.scale)
        output: Tensor = self.o_proj(y.transpose(1, 2).flatten(-2))
        return output


class Layer(nn.Module):
    """One block: attention, then MLP, each on the normalised residual stream."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.branch_scale = config.branch_scale
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor, turns: Turns, mask: Mask | None) -> Tensor:
        x = x + scaled(self.attention(self.attention_norm(x), turns, mask), self.branch_scale)
        return x + scaled(self.mlp(self.mlp_norm(x)), self.branch_scale)


class Llama(LanguageModel):
    """A LLaMA language model whose initial weights are those of `generator` (default: seed 0)."""

    residual_outputs: ClassVar[tuple[str, ...]] = ("o_proj.weight", "down_proj.weight")
    block: ClassVar[Callable[..., nn.Module]] = Layer
    """What the layers are made of."""
    config: LlamaConfig

    def __init__(self, config: LlamaConfig, generator: torch.Generator | None = None) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(self.block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.rotary = Rotary(config.head_size, config.max_sequence_length, config.rope_theta)
        self.complete(generator)

    def reset_parameters(self, generator: torch.Generator) -> None:
        """Draw the initial weights and fill the rotary tables."""
        super().reset_parameters(generator)
        self.rotary.reset_parameters()

    @property
    def logit_scale(self) -> float:
        """1 over the width factor of muP."""
        return 1 / self.config.width_factor

    def features(self, tokens: Tensor, documents: Tensor | None = None) -> Features:
        """Return the last hidden states; see `LanguageModel.features`."""
        turns = self.rotary(tokens.shape[1], documents)
        mask = document_mask(documents, self.config.head_size)
        x = scaled(self.embed(tokens), self.config.embedding_scale)
        for layer in self.layers:
            x = self.through(layer, x, turns, mask)
        return Features(self.norm(x), None, {})
