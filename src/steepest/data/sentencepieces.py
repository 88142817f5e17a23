"""Tokenizers in SentencePiece's own format, run by its own library."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from steepest.data import sentencepiece_model, vocabulary
from steepest.data.vocabulary import Ids
from steepest.errors import UserError

FILE = "spiece.model"


class SentencePieceTokenizer:
    """A model file. Text that spells a control piece stays text; nothing is put around a text.

    Its normalisation, if it has one, is what can't be undone by `decode`. The fingerprint is that
    of the file: a tokenizer.json of the same vocabulary may split rare characters in other ways.
    """

    def __init__(self, model: bytes, *, name: str, end: int) -> None:
        """Take the content of a model file and the id that ends a document.

        Raises UserError when it is no model, and when the package 'sentencepiece' is missing.
        """
        self.name = name
        self.end = end
        self._model = model
        self._processor = _processor(model, name)
        self.vocab_size: int = self._processor.vocab_size()
        if not 0 <= end < self.vocab_size:
            raise UserError(f"Tokenizer {name} has no token with the id {end} to end documents.")
        self._type = vocabulary.id_type(self.vocab_size)
        self.fingerprint = hashlib.sha256(model + f" {end}".encode()).hexdigest()[:16]

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the file: the processor is made again."""
        return _open, (self._model, self.name, self.end)

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """Return uint16 or uint32 ids for each text; raise UserError for lone surrogates."""
        vocabulary.check_texts(texts)
        return [np.array(self._processor.encode(text), dtype=self._type) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text; control pieces, the end of a document too, leave none."""
        text: str = self._processor.decode(vocabulary.check_ids(ids, self.vocab_size).tolist())
        return text

    def save(self, folder: Path) -> None:
        """Write the model file.

        AutoTokenizer reads a unigram model with T5's class, which puts the end after a text and
        maps some clusters of combining characters differently; other models it can't read.
        """
        config = {"eos_token": self._processor.id_to_piece(self.end)}
        model = sentencepiece_model.read(self._model, self.name)
        if model.model_type == sentencepiece_model.UNIGRAM:
            config |= {"tokenizer_class": "T5Tokenizer", "extra_ids": 0}
        vocabulary.save(
            folder,
            {FILE: self._model},
            config,
            kind="sentencepiece",
            name=self.name,
            vocab_size=self.vocab_size,
            end=self.end,
            fingerprint=self.fingerprint,
        )


def _open(model: bytes, name: str, end: int) -> SentencePieceTokenizer:
    return SentencePieceTokenizer(model, name=name, end=end)


def _processor(model: bytes, name: str) -> Any:
    try:
        import sentencepiece
    except ImportError as error:
        raise UserError(
            f"Tokenizer {name} is a SentencePiece model that needs the package 'sentencepiece': "
            "pip install sentencepiece, or pass a tokenizer.json of it."
        ) from error
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=model)
    except RuntimeError as error:
        raise UserError(f"Tokenizer {name} is no SentencePiece model: {error}") from error
