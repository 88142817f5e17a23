"""A corpus as tokens: prepared once, kept in a cache, memory-mapped from there."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from steepest import files
from steepest.data import tokenizer as bpe
from steepest.data.corpus import Corpus, load_corpus

Tokens = npt.NDArray[np.unsignedinteger]

LAYOUT = 1  # of the cache folder; a change of what is written there needs the next number
SPLITS = ("train", "validation")


@dataclass(frozen=True)
class TokenData:
    """Training and validation tokens, 1-D and memory-mapped, uint16 or else uint32.

    Every document is followed by the end-of-document token. `validation_bytes_per_token` (UTF-8
    bytes of the validation documents per validation token) turns nats per token into bits per
    byte. `fingerprint` covers the texts, the tokenizer and the split; `description` is one line.
    """

    train: Tokens
    validation: Tokens
    vocab_size: int
    validation_bytes_per_token: float
    fingerprint: str
    description: str


def cache_folder() -> Path:
    """Return $STEEPEST_CACHE, else `steepest` in the user's cache folder."""
    if chosen := os.environ.get("STEEPEST_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "steepest"


def prepare(
    corpus: str = "sotu", vocab_size: int = 1024, cache_dir: Path | None = None
) -> TokenData:
    """Tokenize a corpus, or find its tokens in the cache, and return them.

    `corpus` is the name of an embedded one, a .txt file, or a folder of .txt files. The tokenizer
    is trained on the training documents alone. Processes may prepare the same corpus at the same
    time: they write the same bytes, each file atomically, and the description last. Raises
    UserError for a corpus or vocab_size that cannot be used.
    """
    bpe.check_vocab_size(vocab_size)
    source = load_corpus(corpus)
    key = _key(source, vocab_size)
    folder = (cache_dir if cache_dir is not None else cache_folder()) / "tokens" / key
    meta = _read_meta(folder)
    if meta is None:
        _build(source, vocab_size, folder)
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    shards = {name: np.memmap(folder / f"{name}.bin", meta["dtype"], mode="r") for name in SPLITS}
    return TokenData(
        train=shards["train"],
        validation=shards["validation"],
        vocab_size=vocab_size,
        validation_bytes_per_token=meta["validation_bytes"] / len(shards["validation"]),
        fingerprint=meta["fingerprint"],
        description=_describe(source, shards, vocab_size),
    )


def _key(source: Corpus, vocab_size: int) -> str:
    """Name all that decides the cached bytes: texts, split, vocabulary, library and layout."""
    digest = _digest_of_split(source)
    digest.update(f"{vocab_size} {bpe.library_version()} {LAYOUT}".encode())
    return digest.hexdigest()[:24]


def _digest_of_split(source: Corpus) -> hashlib._Hash:
    digest = hashlib.sha256()
    for documents in source.split():
        for document in documents:
            text = document.encode()
            digest.update(f"document {len(text)}\n".encode() + text)
        digest.update(b"end of split\n")
    return digest


def _build(source: Corpus, vocab_size: int, folder: Path) -> None:
    training, validation = source.split()
    tokenizer = bpe.train(training, vocab_size)
    dtype = "<u2" if vocab_size <= 2**16 else "<u4"
    hashes = {
        name: _write_shard(folder / f"{name}.bin", bpe.encode(tokenizer, documents, dtype))
        for name, documents in zip(SPLITS, (training, validation), strict=True)
    }
    description = tokenizer.to_str()
    files.write_text(folder / "tokenizer.json", description)
    fingerprint = _digest_of_split(source)
    merges = json.loads(description)["model"]["merges"]
    fingerprint.update(json.dumps([vocab_size, merges]).encode())
    meta = {
        "dtype": dtype,
        "sha256": hashes,
        "validation_bytes": sum(len(document.encode()) for document in validation),
        "fingerprint": fingerprint.hexdigest()[:16],
    }
    files.write_text(folder / "meta.json", json.dumps(meta, indent=1))


def _write_shard(path: Path, arrays: Iterable[Tokens]) -> str:
    """Write the arrays one after the other; return the SHA-256 of the file."""
    digest = hashlib.sha256()
    with files.replacing(path) as temporary, temporary.open("wb") as stream:
        for array in arrays:
            data = array.tobytes()
            digest.update(data)
            stream.write(data)
    return digest.hexdigest()


def _read_meta(folder: Path) -> dict[str, Any] | None:
    """Return the description of a prepared folder; None if it is absent or damaged."""
    path = folder / "meta.json"
    if not path.exists():
        return None
    try:
        meta: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        intact = all(_sha256(folder / f"{name}.bin") == meta["sha256"][name] for name in SPLITS)
    except (OSError, ValueError, KeyError, TypeError):
        intact = False
    if not intact:
        warnings.warn(f"The token cache {folder} is damaged and is built anew.", stacklevel=3)
        return None
    return meta


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _describe(source: Corpus, shards: dict[str, np.memmap[Any, Any]], vocab_size: int) -> str:
    counts: Sequence[int] = [len(documents) for documents in source.split()]
    repeats = f", {source.repeats} repeated documents left out" if source.repeats else ""
    return (
        f"{source.name} ({source.licence}): {counts[0]} documents, {len(shards['train']):,} tokens "
        f"for training; {counts[1]} whole documents, {len(shards['validation']):,} tokens held out"
        f"{repeats}; byte-level BPE of {vocab_size:,} trained on the training documents"
    )
