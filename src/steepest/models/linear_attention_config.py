"""Configs of the models of linear attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from steepest.errors import UserError
from steepest.models.config import ModelConfig


@dataclass(frozen=True)
class LinearAttentionConfig(ModelConfig):
    """The fields that the models of linear attention share."""

    heads: int = 4
    """Heads, each with a state of its own."""
    expand_v: float = 1.0
    """Channels of all values, over hidden_size."""
    intermediate_size: int | None = None
    """Channels inside the MLP; if not given, 8/3 of hidden_size, up to a multiple of 256."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_counts("heads")
        self.require_positive("expand_v")
        if self.intermediate_size is not None:
            self.require_counts("intermediate_size")

    @property
    def mlp_size(self) -> int:
        """Channels inside the MLP."""
        if self.intermediate_size is not None:
            return self.intermediate_size
        return -(-(self.hidden_size * 8 // 3) // 256) * 256

    @property
    def key_size(self) -> int:
        """Channels of the queries and keys of one head."""
        raise NotImplementedError

    @property
    def value_size(self) -> int:
        """Channels of the values of one head."""
        return self.channels("hidden_size", "expand_v", self.heads)

    def channels(self, size: str, factor: str, heads: int = 1) -> int:
        """Return the product of two fields over `heads`; UserError unless it is a whole number."""
        total = getattr(self, size) * getattr(self, factor)
        if total < heads or total % heads != 0:
            wanted = "a multiple of heads" if heads > 1 else "a whole number"
            raise UserError(f"Model {size} times {factor} must be {wanted}, not {total:g}.")
        return int(total) // heads


@dataclass(frozen=True)
class GLAConfig(LinearAttentionConfig):
    """Shape of a gated linear attention model (Yang et al., 2023, arXiv:2312.06635).

    Raises UserError when a value is impossible.
    """

    architecture: Literal["gla"] = "gla"
    """Which model this is the config of."""
    expand_k: float = 0.5
    """Channels of all keys, over hidden_size."""
    gate_rank: int = 16
    """Rank of the map from the residual stream to the decay of every key channel."""
    gate_logit_normalizer: float = 16.0
    """What the logarithm of the decay is divided by; more makes memory longer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_counts("gate_rank")
        self.require_positive("expand_k", "gate_logit_normalizer")
        _ = self.key_size, self.value_size  # raises if impossible

    @property
    def key_size(self) -> int:
        """Channels of the queries and keys of one head."""
        return self.channels("hidden_size", "expand_k", self.heads)


@dataclass(frozen=True)
class DeltaNetConfig(LinearAttentionConfig):
    """Shape of a DeltaNet model (Yang et al., 2024, arXiv:2406.06484).

    Raises UserError when a value is impossible.
    """

    architecture: Literal["deltanet"] = "deltanet"
    """Which model this is the config of."""
    expand_k: float = 1.0
    """Channels of all keys, over hidden_size."""
    conv_size: int = 4
    """Tokens that the convolutions of queries, keys and values see."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_counts("conv_size")
        self.require_positive("expand_k")
        _ = self.key_size, self.value_size  # raises if impossible

    @property
    def key_size(self) -> int:
        """Channels of the queries and keys of one head."""
        return self.channels("hidden_size", "expand_k", self.heads)


@dataclass(frozen=True)
class GatedDeltaNetConfig(LinearAttentionConfig):
    """Shape of a Gated DeltaNet model (Yang et al., 2024, arXiv:2412.06464).

    A layer has about as many parameters as one of a Transformer where heads times head_size is 3/4
    of hidden_size and expand_v is 2. Raises UserError when a value is impossible.
    """

    architecture: Literal["gated_deltanet"] = "gated_deltanet"
    """Which model this is the config of."""
    heads: int = 2
    """Heads, each with a state of its own."""
    head_size: int = 24
    """Channels of the queries and keys of one head."""
    expand_v: float = 2.0
    """Channels of the values of one head, over head_size."""
    conv_size: int = 4
    """Tokens that the convolutions of queries, keys and values see."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_counts("head_size", "conv_size")
        _ = self.value_size  # raises if impossible

    @property
    def key_size(self) -> int:
        """Channels of the queries and keys of one head."""
        return self.head_size

    @property
    def value_size(self) -> int:
        """Channels of the values of one head."""
        return self.channels("head_size", "expand_v")
