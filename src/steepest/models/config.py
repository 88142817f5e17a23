"""What every model's config has."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from steepest.errors import UserError


@dataclass(frozen=True)
class ModelConfig:
    """The fields that all architectures share. Raises UserError when a value is impossible."""

    vocab_size: int = 1024
    """Rows of the embedding table and of the head."""
    hidden_size: int = 64
    """Channels of the residual stream."""
    layers: int = 2
    """Blocks of a token mixer and an MLP."""
    max_sequence_length: int = 2048
    """Longest sequence the model takes, in tokens."""
    tie_embeddings: bool = False
    """Let the head be the embedding table."""
    norm_eps: float = 1e-5
    """Added to the mean square (RMSNorm) or the variance (LayerNorm)."""
    init: Literal["scaled", "normal"] = "scaled"
    """Initial weights: see `steepest.models.initialisation`."""
    init_std: float = 0.02
    """Standard deviation of the initial weights."""

    def __post_init__(self) -> None:
        self.require_counts("vocab_size", "hidden_size", "layers", "max_sequence_length")
        self.require_positive("norm_eps", "init_std")
        self.require_flags("tie_embeddings")
        self.require_one_of("init", ("scaled", "normal"))

    def require_counts(self, *names: str) -> None:
        """Raise UserError unless these fields are whole numbers of at least 1."""
        for name in names:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UserError(
                    f"Model {name} must be a whole number of at least 1, not {value!r}."
                )

    def require_positive(self, *names: str) -> None:
        """Raise UserError unless these fields are positive, finite numbers."""
        for name in names:
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not (number and math.isfinite(value) and value > 0):
                raise UserError(f"Model {name} must be a positive number, not {value!r}.")

    def require_flags(self, *names: str) -> None:
        """Raise UserError unless these fields are true or false."""
        for name in names:
            if not isinstance(value := getattr(self, name), bool):
                raise UserError(f"Model {name} must be true or false, not {value!r}.")

    def require_one_of(self, name: str, options: tuple[str, ...]) -> None:
        """Raise UserError unless the field is one of `options`."""
        if (value := getattr(self, name)) not in options:
            raise UserError(f"Model {name} must be one of {', '.join(options)}, not {value!r}.")
