"""The shape of a LLaMA model, its named sizes and its parameter count."""

from __future__ import annotations

import dataclasses
import math
import tomllib
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from steepest.errors import UserError, unknown


@dataclass(frozen=True)
class LlamaConfig:
    """Shape of a LLaMA model (Touvron et al., 2023, arXiv:2302.13971).

    `kv_heads` below `heads` gives grouped-query attention (Ainslie et al., 2023,
    arXiv:2305.13245); None means as many as `heads`. Raises UserError when a value is impossible.
    """

    vocab_size: int = 1024
    """Rows of the embedding table and of the head."""
    hidden_size: int = 64
    """Channels of the residual stream."""
    layers: int = 2
    """Blocks of attention and MLP."""
    heads: int = 4
    """Attention heads; each has hidden_size / heads channels."""
    kv_heads: int | None = None
    """Heads of keys and values; as many as heads if not given."""
    intermediate_size: int = 176
    """Channels inside the MLP."""
    rope_theta: float = 10_000.0
    """Base of the wavelengths of the rotary positions."""
    norm_eps: float = 1e-5
    """Added to the mean square in RMSNorm."""
    tie_embeddings: bool = False
    """Let the head be the embedding table."""
    max_sequence_length: int = 2048
    """Longest sequence the model takes, in tokens."""
    init_std: float = 0.02
    """Standard deviation of the initial weights; of residual outputs, over sqrt(2 * layers)."""

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "layers",
            "heads",
            "intermediate_size",
            "max_sequence_length",
        ):
            _require_count(name, getattr(self, name))
        if self.kv_heads is not None:
            _require_count("kv_heads", self.kv_heads)
        for name in ("rope_theta", "norm_eps", "init_std"):
            _require_positive(name, getattr(self, name))
        if not isinstance(self.tie_embeddings, bool):
            raise UserError(
                f"Model tie_embeddings must be true or false, not {self.tie_embeddings!r}."
            )
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


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of trainable scalars; `total` is the sum of the other two.

    `embedding` is the token embedding and, unless tied to it, the output head.
    """

    total: int
    embedding: int
    non_embedding: int


def parameter_count(config: LlamaConfig) -> ParameterCount:
    """Count the parameters of a model from its shape, without building it."""
    hidden = config.hidden_size
    key_value = config.key_value_heads * config.head_size
    attention = 2 * hidden * hidden + 2 * hidden * key_value
    mlp = 3 * hidden * config.intermediate_size
    gains = 2 * hidden
    non_embedding = config.layers * (attention + mlp + gains) + hidden
    embedding = config.vocab_size * hidden * (1 if config.tie_embeddings else 2)
    return ParameterCount(embedding + non_embedding, embedding, non_embedding)


def sizes() -> dict[str, LlamaConfig]:
    """Return the named sizes of `sizes.toml`, in the order of the file."""
    fields = {field.name for field in dataclasses.fields(LlamaConfig)}
    return {
        name: LlamaConfig(**{key: value for key, value in entry.items() if key in fields})
        for name, entry in size_entries().items()
    }


def size(name: str) -> LlamaConfig:
    """Return the size called `name`; raise UserError naming the nearest one if there is none."""
    known = sizes()
    if name not in known:
        raise unknown("model size", name, known)
    return known[name]


@cache
def size_entries() -> dict[str, dict[str, Any]]:
    """Return `sizes.toml` as it is: besides the fields, `source`, `note` and `parameters`."""
    text = resources.files("steepest.models").joinpath("sizes.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


def _require_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"Model {name} must be a whole number of at least 1, not {value!r}.")


def _require_positive(name: str, value: object) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number and math.isfinite(value) and value > 0):  # type: ignore[arg-type,operator]
        raise UserError(f"Model {name} must be a positive number, not {value!r}.")
