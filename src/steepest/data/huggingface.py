"""Tokenizers described by a tokenizer.json, run by Hugging Face's library `tokenizers`."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from steepest.data import bpe, byte_level, vocabulary
from steepest.data.vocabulary import Ids, Json
from steepest.errors import UserError

if TYPE_CHECKING:
    import tokenizers

TEXTS_AT_A_TIME = 64
# Noncharacters of Unicode: no text has them.
NOT_TEXT = "\ufdd0{}\ufdd1"
# Models that look up stretches of text as a whole, and so find a special token that it spells.
FIND_WHOLE = {"Unigram", "WordLevel"}


class HuggingFaceTokenizer:
    """A tokenizer.json, without what it would put around a text or cut off.

    Text that spells a special token stays text; no token is put before or after it. Texts of one
    call are encoded on all cores, or on one with TOKENIZERS_PARALLELISM=false in the environment.
    Byte-level BPE is encoded by `tiktoken` where that is installed and gives the same ids.
    """

    def __init__(self, description: str, *, name: str, end: int) -> None:
        """Take the text of a tokenizer.json and the id that ends a document.

        Raises UserError when it can't be read, when `end` is not in its vocabulary, and when the
        package 'tokenizers' is missing.
        """
        self.name = name
        self.end = end
        self._decoder = _plain(description, name)
        self._description = self._decoder.to_str()
        vocab = self._decoder.get_vocab(with_added_tokens=True)
        self.vocab_size = 1 + max(vocab.values(), default=-1)
        if self._decoder.id_to_token(end) is None:
            raise UserError(f"Tokenizer {name} has no token with the id {end} to end documents.")
        data = json.loads(self._description)
        self.fingerprint = vocabulary.fingerprint(data, end)
        self._type = vocabulary.id_type(self.vocab_size)
        self._encoder = self._decoder
        if data["model"]["type"] in FIND_WHOLE:
            self._encoder = _parse(json.dumps(_without_special_tokens(data)), name)
        self._encoder.encode_special_tokens = True
        self._fast = byte_level.encoder(self._decoder, data)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the description: the encoders are made again."""
        return _open, (self._description, self.name, self.end)

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """Return the ids of each text, uint16 or, for more than 65,536 entries, uint32.

        Raises UserError for lone surrogates, and for words without an id in a vocabulary that has
        no token for the unknown.
        """
        vocabulary.check_texts(texts)
        if self._fast is not None:
            return [self._fast(text).astype(self._type) for text in texts]
        arrays: list[Ids] = []
        for start in range(0, len(texts), TEXTS_AT_A_TIME):
            part = list(texts[start : start + TEXTS_AT_A_TIME])
            try:
                encodings = self._encoder.encode_batch_fast(part, add_special_tokens=False)
            except Exception as error:  # the library raises nothing narrower
                raise UserError(f"Tokenizer {self.name} can't encode a text: {error}") from error
            arrays += [np.array(encoding.ids, dtype=self._type) for encoding in encodings]
        return arrays

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text; special tokens are spelled out."""
        checked = vocabulary.check_ids(ids, self.vocab_size)
        return self._decoder.decode(checked.tolist(), skip_special_tokens=False)

    def save(self, folder: Path) -> None:
        """Write the tokenizer.json it was made of."""
        token = self._decoder.id_to_token(self.end)
        assert token is not None
        vocabulary.save(
            folder,
            {"tokenizer.json": self._description},
            vocabulary.huggingface_config(token),
            kind="huggingface",
            name=self.name,
            vocab_size=self.vocab_size,
            end=self.end,
            fingerprint=self.fingerprint,
        )

    def cut(self, vocab_size: int) -> HuggingFaceTokenizer:
        """Return it without its last entries, which must be special tokens that text never gives.

        T5's 100 sentinels are such: benchmarks with its tokenizer train models of 32,000 entries
        instead of 32,100. Raises UserError when other tokens, or the end of a document, are there.
        """
        data = json.loads(self._description)
        special = {token["id"] for token in data["added_tokens"] if token["special"]}
        ids = self._decoder.get_vocab(with_added_tokens=True).values()
        smallest = 1 + max(set(ids) - special | {self.end})
        if not smallest <= vocab_size <= self.vocab_size:
            raise UserError(
                f"Tokenizer {self.name} has {self.vocab_size:,} entries, of which the first "
                f"{smallest:,} are needed, so its vocab_size can't be {vocab_size:,}; a model may "
                "have a larger vocabulary than its tokenizer."
            )
        data["added_tokens"] = [t for t in data["added_tokens"] if t["id"] < vocab_size]
        model = data["model"]
        if isinstance(model["vocab"], dict):
            model["vocab"] = {t: index for t, index in model["vocab"].items() if index < vocab_size}
        else:
            model["vocab"] = model["vocab"][:vocab_size]
        return HuggingFaceTokenizer(json.dumps(data), name=self.name, end=self.end)


def _open(description: str, name: str, end: int) -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer(description, name=name, end=end)


def _parse(description: str, name: str) -> tokenizers.Tokenizer:
    bpe.library_version()
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_str(description)
    except Exception as error:  # the library raises nothing narrower
        raise UserError(f"Tokenizer {name} has no readable tokenizer.json: {error}") from error


def _plain(description: str, name: str) -> tokenizers.Tokenizer:
    """Drop what would cut texts off or put tokens around them."""
    tokenizer = _parse(description, name)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.post_processor = None
    return tokenizer


def _without_special_tokens(data: Json) -> Json:
    """Rename special tokens to what no text spells; ids stay."""
    special = {t["content"] for t in data["added_tokens"] if t["special"]}

    def renamed(token: str) -> str:
        return NOT_TEXT.format(token) if token in special else token

    result = copy.deepcopy(data)
    for token in result["added_tokens"]:
        token["content"] = renamed(token["content"])
    model = result["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {renamed(token): index for token, index in model["vocab"].items()}
    else:
        model["vocab"] = [[renamed(token), score] for token, score in model["vocab"]]
    if model.get("unk_token"):
        model["unk_token"] = renamed(model["unk_token"])
    return result
