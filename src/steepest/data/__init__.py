"""Text to batches: corpora, tokenizer, cached tokens and the loader."""

from steepest.data.loader import batch, validation_batches
from steepest.data.tokens import TokenData, prepare

__all__ = ["TokenData", "batch", "prepare", "validation_batches"]
