"""Tokenizers without training or dependencies: a token is a byte, or a character."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from steepest.data import vocabulary
from steepest.data.vocabulary import END_OF_DOCUMENT, Ids, Json
from steepest.errors import UserError


class ByteTokenizer:
    """The UTF-8 bytes of a text as ids 0 to 255, and 256 for the end of a document. Lossless."""

    vocab_size = 257
    end = 256

    def __init__(self, name: str = "bytes") -> None:
        self.name = name
        self._pieces = [bytes([value]) for value in range(256)] + [END_OF_DOCUMENT.encode()]
        self.fingerprint = vocabulary.fingerprint(self._description(), self.end)

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """Return uint16 [bytes of the text] for each text; raise UserError for lone surrogates."""
        vocabulary.check_texts(texts)
        return [np.frombuffer(text.encode(), np.uint8).astype("<u2") for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text; bytes that are not UTF-8 become U+FFFD."""
        checked = vocabulary.check_ids(ids, self.vocab_size)
        return b"".join(self._pieces[index] for index in checked).decode(errors="replace")

    def save(self, folder: Path) -> None:
        """Write it as a byte-level BPE without merges."""
        _save(self, "bytes", self._description(), folder)

    @staticmethod
    def _description() -> Json:
        symbols = byte_symbols()
        pre_tokenizer = {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": False,
        }
        return _description(
            model={
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": False,
                "vocab": {symbols[value]: value for value in range(256)} | {END_OF_DOCUMENT: 256},
                "merges": [],
            },
            pre_tokenizer=pre_tokenizer,
            decoder=pre_tokenizer | {"add_prefix_space": True, "use_regex": True},
            end=256,
        )


class CharacterTokenizer:
    """The characters of the training documents, sorted, and an end of document. Lossless.

    There is no id for unknown characters: a text that has one can't be encoded, since counting it
    as one guessable token would make the loss look better than it is.
    """

    def __init__(self, characters: Iterable[str], name: str = "chars") -> None:
        """Take the characters in any order."""
        self.name = name
        self._characters = sorted(set(characters))
        if not self._characters:
            raise UserError("The training documents have no characters to make a vocabulary of.")
        vocabulary.check_texts(self._characters)
        self.end = len(self._characters)
        self.vocab_size = self.end + 1
        self._type = vocabulary.id_type(self.vocab_size)
        points = np.array([ord(character) for character in self._characters])
        self._ids = np.full(int(points[-1]) + 2, -1, dtype=np.int32)
        self._ids[points] = np.arange(self.end)
        self.fingerprint = vocabulary.fingerprint(self._description(), self.end)

    @classmethod
    def train(cls, documents: Iterable[str], name: str = "chars") -> CharacterTokenizer:
        """Return the tokenizer of all characters of the documents."""
        characters: set[str] = set()
        for document in documents:
            characters.update(document)
        return cls(characters, name)

    @classmethod
    def load(cls, folder: Path, name: str) -> CharacterTokenizer:
        """Return what `save` wrote."""
        description = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        return cls(set(description["model"]["vocab"]) - {END_OF_DOCUMENT}, name)

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """Return uint16 or uint32 [characters of the text] for each text.

        Raises UserError for a character that is in no training document.
        """
        vocabulary.check_texts(texts)
        return [self._encode(text) for text in texts]

    def _encode(self, text: str) -> Ids:
        points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
        # All that lies behind the last known character shares the last entry, which is unknown.
        ids = self._ids[np.minimum(points, len(self._ids) - 1)]
        if ids.size and ids.min() < 0:
            position = int(np.argmin(ids))
            raise UserError(
                f"Character {text[position]!r} (U+{ord(text[position]):04X}) is in no training "
                "document, so the tokenizer 'chars' has no id for it; use 'bytes', or a corpus "
                "whose training documents have every character."
            )
        known: Ids = ids.astype(self._type)
        return known

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text."""
        symbols = [*self._characters, END_OF_DOCUMENT]
        return "".join(symbols[index] for index in vocabulary.check_ids(ids, self.vocab_size))

    def save(self, folder: Path) -> None:
        """Write it as single characters looked up whole."""
        _save(self, "chars", self._description(), folder)

    def _description(self) -> Json:
        table = {character: index for index, character in enumerate(self._characters)}
        return _description(
            # A character without an id is an error there too, for want of the unknown token.
            model={
                "type": "WordLevel",
                "vocab": table | {END_OF_DOCUMENT: self.end},
                "unk_token": "<unk>",
            },
            pre_tokenizer={
                "type": "Split",
                "pattern": {"Regex": r"[\s\S]"},
                "behavior": "Isolated",
                "invert": False,
            },
            decoder={"type": "Fuse"},
            end=self.end,
        )


def byte_symbols() -> dict[int, str]:
    """Return the character that stands for each byte in a byte-level BPE's vocabulary.

    Printable bytes stand for themselves, the others for U+0100, U+0101, ... in order (Radford et
    al., 2019, "Language Models are Unsupervised Multitask Learners", released code).
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [value for value in range(256) if value not in printable]
    return {value: chr(value) for value in printable} | {
        value: chr(256 + index) for index, value in enumerate(others)
    }


def _description(*, model: Json, pre_tokenizer: Json, decoder: Json, end: int) -> Json:
    """Return a tokenizer.json with the end of a document as its one special token."""
    token = {
        "id": end,
        "content": END_OF_DOCUMENT,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [token],
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": decoder,
        "model": model,
    }


def _save(
    tokenizer: ByteTokenizer | CharacterTokenizer, kind: str, description: Json, folder: Path
) -> None:
    vocabulary.save(
        folder,
        {"tokenizer.json": json.dumps(description, ensure_ascii=False)},
        vocabulary.huggingface_config(END_OF_DOCUMENT),
        kind=kind,
        name=tokenizer.name,
        vocab_size=tokenizer.vocab_size,
        end=tokenizer.end,
        fingerprint=tokenizer.fingerprint,
    )
