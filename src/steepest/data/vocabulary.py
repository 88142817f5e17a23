"""What every tokenizer shares: types of ids, checks, the fingerprint and the folder it is kept in.

A folder holds files that Hugging Face's AutoTokenizer loads (tokenizer.json or spiece.model, and
tokenizer_config.json) and ABOUT, which says which of our tokenizers reads them back.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from steepest import files
from steepest.errors import UserError

Ids = npt.NDArray[np.unsignedinteger]
Json = dict[str, Any]

END_OF_DOCUMENT = "<|endoftext|>"
ABOUT = "steepest-tokenizer.json"
# Settings of a tokenizer.json that concern offsets or the way back to text, not ids.
NOT_FOR_IDS = {"trim_offsets"}


@dataclass(frozen=True)
class About:
    """What ABOUT says."""

    kind: Literal["bytes", "chars", "huggingface", "sentencepiece"]
    name: str
    vocab_size: int
    end: int
    fingerprint: str
    sha256: dict[str, str]
    """Of each file that the tokenizer is read back from."""


def id_type(vocab_size: int) -> np.dtype[np.unsignedinteger]:
    """Return the smallest type for ids below `vocab_size`: little-endian uint16 or uint32."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def check_texts(texts: Iterable[str]) -> None:
    """Raise UserError for half a surrogate pair, which Python strings allow and UTF-8 does not."""
    for text in texts:
        try:
            _ = text.isascii() or text.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"A document has the lone surrogate U+{ord(text[error.start]):04X} at character "
                f"{error.start}, which is no text; its source must be repaired or read with "
                "errors replaced."
            ) from error


def check_ids(ids: Sequence[int] | npt.NDArray[Any], vocab_size: int) -> npt.NDArray[np.int64]:
    """Return ids as int64; raise UserError if one is outside the vocabulary."""
    array = np.asarray(ids, dtype=np.int64)
    if array.size and not 0 <= array.min() <= array.max() < vocab_size:
        wrong = int(array[(array < 0) | (array >= vocab_size)][0])
        raise UserError(f"Id {wrong} is outside the tokenizer's vocabulary of {vocab_size:,}.")
    return array


def fingerprint(description: Mapping[str, Any], end: int) -> str:
    """Return 16 hexadecimal digits of the SHA-256 of all that decides the ids of a text.

    `description` is a tokenizer.json as the library `tokenizers` writes it, which spells out every
    setting. Its vocabulary, merges, normalisation, splitting and added tokens count; those special
    tokens that text never gives count by name and id alone; truncation, padding, templates and the
    way back to text do not. Settings that are off count as absent, so that one that a later version
    adds changes nothing.
    """
    model = dict(description["model"])
    vocabulary = model.pop("vocab")
    if isinstance(vocabulary, dict):
        vocabulary = sorted((index, token) for token, index in vocabulary.items())
    merges = [m.split(" ") if isinstance(m, str) else m for m in model.pop("merges", [])]
    added = [
        [token["id"], token["content"]] if token["special"] else _switched_on(token)
        for token in description["added_tokens"]
    ]
    parts = [
        _switched_on(model),
        vocabulary,
        merges,
        _switched_on(description["normalizer"]),
        _switched_on(description["pre_tokenizer"]),
        added,
        end,
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _switched_on(value: Any) -> Any:
    """Leave out settings that are off or that don't concern ids."""
    if isinstance(value, dict):
        return {
            key: _switched_on(part)
            for key, part in value.items()
            if part and key not in NOT_FOR_IDS
        } or None
    if isinstance(value, list):
        return [_switched_on(part) for part in value]
    return value


def save(
    folder: Path,
    contents: Mapping[str, str | bytes],
    config: Mapping[str, Any],
    **about: Any,
) -> None:
    """Write a tokenizer's files, `tokenizer_config.json` and, last, ABOUT, each atomically."""
    data = {
        name: text.encode() if isinstance(text, str) else text for name, text in contents.items()
    }
    for name, part in data.items():
        files.write_bytes(folder / name, part)
    files.write_text(folder / "tokenizer_config.json", json.dumps(config, indent=1) + "\n")
    hashes = {name: hashlib.sha256(part).hexdigest() for name, part in data.items()}
    description = asdict(About(**about, sha256=hashes))
    files.write_text(folder / ABOUT, json.dumps(description, indent=1) + "\n")


def huggingface_config(end: str) -> Json:
    """Return the `tokenizer_config.json` with which AutoTokenizer reads tokenizer.json as it is."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": end,
        "clean_up_tokenization_spaces": False,
    }


def read_about(folder: Path) -> About:
    """Return what ABOUT says once the files are known to be those that were saved.

    Raises UserError when the folder holds no saved tokenizer or a damaged one.
    """
    path = folder / ABOUT
    if not path.is_file():
        raise UserError(f"Folder {folder} holds no saved tokenizer: it has no {ABOUT}.")
    try:
        about = About(**json.loads(path.read_text(encoding="utf-8")))
        intact = all(
            hashlib.sha256((folder / name).read_bytes()).hexdigest() == expected
            for name, expected in about.sha256.items()
        )
    except (OSError, ValueError, TypeError, AttributeError):
        intact = False
    if not intact:
        raise UserError(
            f"The tokenizer in {folder} is damaged: its files are not those that {ABOUT} describes."
        )
    return about
