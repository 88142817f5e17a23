"""Text to batches: corpora, tokenizers, shards of tokens and the loader."""

from steepest.data.loader import Loader, validation_batches
from steepest.data.packing import Batch, Packing
from steepest.data.splits import TokenSplit
from steepest.data.tokens import TokenData, open_tokens, prepare

__all__ = [
    "Batch",
    "Loader",
    "Packing",
    "TokenData",
    "TokenSplit",
    "open_tokens",
    "prepare",
    "validation_batches",
]
