"""Byte-level byte-pair encoding (Sennrich et al., 2016, arXiv:1508.07909), trained per corpus."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from steepest.data.vocabulary import END_OF_DOCUMENT
from steepest.errors import UserError

if TYPE_CHECKING:
    import tokenizers

MIN_VOCAB_SIZE = 257  # every byte, and the end of a document
DOCUMENTS_AT_A_TIME = 64


def library_version() -> str:
    """Return the version of `tokenizers`; raise UserError when it is not installed."""
    try:
        import tokenizers
    except ImportError as error:
        raise UserError(
            "Preparing a corpus needs the package 'tokenizers': pip install 'steepest[bench]'."
        ) from error
    return tokenizers.__version__


def check_vocab_size(vocab_size: int) -> None:
    """Raise UserError when the vocabulary could not hold every byte and the special token."""
    if isinstance(vocab_size, bool) or not isinstance(vocab_size, int):
        raise UserError(f"vocab_size must be a whole number, not {vocab_size!r}.")
    if vocab_size < MIN_VOCAB_SIZE:
        raise UserError(
            f"vocab_size must be at least {MIN_VOCAB_SIZE} (256 bytes and the end-of-document "
            f"token), not {vocab_size}."
        )


def train(documents: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
    """Train a tokenizer; the same documents and version of `tokenizers` give the same one.

    Raises UserError when the documents have too few repeated pairs for `vocab_size` entries.
    """
    check_vocab_size(vocab_size)
    library_version()
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # A document that spells out the special token keeps it as text.
    tokenizer.encode_special_tokens = True
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    made = tokenizer.get_vocab_size()
    if made < vocab_size:
        raise UserError(
            f"The corpus is too small for vocab_size {vocab_size}: its training documents allow "
            f"{made - MIN_VOCAB_SIZE} merges, so a vocab_size of at most {made}."
        )
    return tokenizer


def encode(
    tokenizer: tokenizers.Tokenizer, documents: Sequence[str], dtype: npt.DTypeLike
) -> Iterator[npt.NDArray[np.unsignedinteger]]:
    """Yield the tokens of each document, its end-of-document token included."""
    end = tokenizer.token_to_id(END_OF_DOCUMENT)
    for start in range(0, len(documents), DOCUMENTS_AT_A_TIME):
        for encoding in tokenizer.encode_batch(documents[start : start + DOCUMENTS_AT_A_TIME]):
            yield np.array([*encoding.ids, end], dtype=dtype)
