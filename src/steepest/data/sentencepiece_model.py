"""SentencePiece model files (Kudo & Richardson, 2018, arXiv:1808.06226), read without the library.

A file is a protocol buffer, `sentencepiece_model.proto` of the SentencePiece project, of which the
few fields are read that decide whether `tokenizers` can stand in for it.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from steepest.errors import UserError

NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6  # types of a piece
UNIGRAM, BPE = 1, 2  # types of a model
SPACE = "▁"
VARINT, LENGTH = 0, 2  # wire types of a protocol buffer
FIXED = {1: 8, 5: 4}  # those of fixed size, in bytes


@dataclass(frozen=True)
class Piece:
    """An entry of the vocabulary; its id is its position."""

    text: str
    score: float
    type: int


@dataclass(frozen=True)
class SentencePieceModel:
    """What a model file says, as far as it is used here."""

    pieces: tuple[Piece, ...]
    model_type: int
    byte_fallback: bool
    whitespace_as_suffix: bool
    end: str
    """The end of a sentence."""
    has_normalisation: bool
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    escape_whitespaces: bool


def read(data: bytes, name: str) -> SentencePieceModel:
    """Return what the content of a model file says; raise UserError if it is not one."""
    pieces: list[Piece] = []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    try:
        for number, value in _fields(data):
            if number == 1:
                piece = dict(_fields(value))
                score = struct.unpack("<f", piece[2])[0] if 2 in piece else 0.0
                pieces.append(Piece(piece[1].decode(), score, piece.get(3, NORMAL)))
            elif number == 2:
                trainer = dict(_fields(value))
            elif number == 3:
                normalizer = dict(_fields(value))
        end = bytes(trainer.get(47, b"</s>")).decode()
    except (IndexError, KeyError, TypeError, ValueError, struct.error):
        pieces = []
    if not pieces:
        raise UserError(
            f"Tokenizer {name} is no SentencePiece model; of Llama 3, whose tokenizer.model is of "
            "another kind, pass the tokenizer.json."
        )
    return SentencePieceModel(
        pieces=tuple(pieces),
        model_type=trainer.get(3, UNIGRAM),
        byte_fallback=bool(trainer.get(35, 0)),
        whitespace_as_suffix=bool(trainer.get(24, 0)),
        end=end,
        has_normalisation=bool(normalizer.get(2)),
        add_dummy_prefix=bool(normalizer.get(3, 1)),
        remove_extra_whitespaces=bool(normalizer.get(4, 1)),
        escape_whitespaces=bool(normalizer.get(5, 1)),
    )


def description(model: SentencePieceModel) -> str | None:
    """Return the tokenizer.json that gives the same ids for every text; None if there is none.

    There is one for models of LLaMA's kind: merges of pairs, no normalisation but the space in
    front. Of normalised ones, T5's among them, `tokenizers` maps some clusters of combining
    characters differently.
    """
    if not _like_llama(model):
        return None
    prefix = [{"type": "Prepend", "prepend": SPACE}] if model.add_dummy_prefix else []
    space = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    special = [
        {
            "id": index,
            "content": piece.text,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for index, piece in enumerate(model.pieces)
        if piece.type in {UNKNOWN, CONTROL}
    ]
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    data = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": {"type": "Sequence", "normalizers": [*prefix, space]},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                *([strip] if model.add_dummy_prefix else []),
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": next(p.text for p in model.pieces if p.type == UNKNOWN),
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": model.byte_fallback,
            "ignore_merges": False,
            "vocab": {piece.text: index for index, piece in enumerate(model.pieces)},
            "merges": _merges(model.pieces),
        },
    }
    return json.dumps(data, ensure_ascii=False)


def _like_llama(model: SentencePieceModel) -> bool:
    normal = {piece.text for piece in model.pieces if piece.type == NORMAL}
    plain = (
        model.model_type == BPE
        and model.escape_whitespaces
        and not model.has_normalisation
        and not model.remove_extra_whitespaces
        and not model.whitespace_as_suffix
    )
    return (
        plain
        and {piece.type for piece in model.pieces} <= {NORMAL, UNKNOWN, CONTROL, BYTE}
        # Else SentencePiece merges characters that alone have no id.
        and all(character in normal for text in normal for character in text)
    )


def _merges(pieces: tuple[Piece, ...]) -> list[tuple[str, str]]:
    """Return the pairs that make a piece of two others, those of the best piece first.

    Several pairs of one piece come in the order of their halves' ids.
    """
    ids = {piece.text: index for index, piece in enumerate(pieces) if piece.type == NORMAL}
    ranked = []
    for text, index in ids.items():
        for middle in range(1, len(text)):
            left, right = text[:middle], text[middle:]
            if left in ids and right in ids:
                ranked.append((-pieces[index].score, index, ids[left], ids[right], left, right))
    return [(left, right) for *_, left, right in sorted(ranked)]


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Yield the (number, value) of each field of a protocol buffer's message.

    A value is an int, or the bytes of a string, a message or a fixed-size number. Raises
    ValueError or IndexError for other data.
    """
    position = 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = data[position]
            position += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while position < len(data):
        number, wire_type = divmod(varint(), 8)
        if wire_type == VARINT:
            yield number, varint()
            continue
        if wire_type not in {*FIXED, LENGTH}:
            raise ValueError(f"wire type {wire_type}")
        size = FIXED[wire_type] if wire_type in FIXED else varint()
        if position + size > len(data):
            raise ValueError("cut short")
        yield number, data[position : position + size]
        position += size
