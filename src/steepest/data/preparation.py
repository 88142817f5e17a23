"""A corpus to shards of tokens: streaming, in parallel, and continued where it was stopped.

Training and validation have no document in common, by what a document is rather than where it
stands. Where a corpus has a validation split of its own, training documents with the content hash
of a validation document are left out. Where it has none, a document is held out if its content
hash, as a part of 2^64, is below the share held out: equal texts fall on the same side, whatever
their order and the number of processes. Validation comes first, from the beginning of the corpus,
so that it does not depend on how many training tokens are asked for.
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from steepest import files
from steepest.data import shards
from steepest.data.encoding import HASHES, Chosen, EncodeAll, content_hash, encoders
from steepest.data.shards import INDEX, Index, Recipe, Shard, SplitEntry, is_prepared
from steepest.data.token_stream import Piece, TokenStream
from steepest.data.workplace import begin, claimed, discard, keep_tokenizer
from steepest.errors import UserError

if TYPE_CHECKING:
    from steepest.data.sources import Source
    from steepest.data.tokenizers import Tokenizer

SHARD_TOKENS = 100_000_000
VALIDATION_TOKENS = 2_000_000
HELD_OUT = 0.01
PROGRESS_SECONDS = 0.25
"""Least time between two calls of `on_progress`."""


@dataclass(frozen=True)
class Progress:
    """How far the preparation of a split is."""

    split: str
    documents: int
    """Documents read, including those left out."""
    tokens: int
    """Tokens of the split."""
    wanted: int | None
    """Tokens asked for; None if all there are."""
    tokens_per_second: float
    """Of this process, as the next."""
    bytes_per_second: float
    """Text read."""
    seconds_left: float | None
    """At this rate; None if the end is not known."""


OnProgress = Callable[[Progress], None]


def prepare(
    source: Source,
    tokenizer: Tokenizer,
    folder: Path,
    *,
    tokens: int | None = None,
    validation_tokens: int | None = VALIDATION_TOKENS,
    held_out: float = HELD_OUT,
    shard_tokens: int = SHARD_TOKENS,
    workers: int = 1,
    on_progress: OnProgress | None = None,
) -> Index:
    """Write `source` as tokens to `folder` (see `steepest.data.shards`); return its index.

    A split ends with the document by which it has `tokens` or `validation_tokens`, or with the
    corpus. `held_out` is the share of documents for validation where the corpus has no split of its
    own. What is written does not depend on `workers`, nor on whether and when the work was stopped:
    the same call continues from the last complete shard, and returns at once when all is there.

    Raises UserError if the source cannot be read, if the folder holds something else or was begun
    with other arguments, if another process works on it, if nothing is left for a split, or if the
    disk is full. Then nothing half-written stays: no shard that is not in the index.
    """
    _check(tokens=tokens, validation_tokens=validation_tokens, workers=workers)
    _check(shard_tokens=shard_tokens)
    if not 0 < held_out < 1:
        raise UserError(f"The share held out must be between 0 and 1, not {held_out}.")
    recipe = Recipe(
        source=source.name,
        licence=source.licence,
        source_description=source.description,
        source_fingerprint=source.fingerprint,
        tokenizer=tokenizer.name,
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        end=tokenizer.end,
        shard_tokens=shard_tokens,
        tokens=tokens,
        validation_tokens=validation_tokens,
        held_out=None if source.own_validation else held_out,
    )
    with claimed(folder):
        index = begin(folder, recipe)
        if index.complete:
            return index
        try:
            with encoders(tokenizer, keep_tokenizer(tokenizer, folder), workers) as encode_all:
                return _continued(source, folder, index, encode_all, on_progress)
        finally:
            if not is_prepared(folder):
                discard(folder)


def _continued(
    source: Source,
    folder: Path,
    index: Index,
    encode_all: EncodeAll,
    on_progress: OnProgress | None,
) -> Index:
    """Write what the index lacks, and return it complete."""
    for split in ("validation", "train"):
        if not index.splits[split].complete:
            stream = _stream(source, folder, index, split, encode_all)
            stream.on_batch = _reporter(split, stream, on_progress)
            index = _write(folder, index, split, stream)
    index = dataclasses.replace(
        index,
        common_documents=shards.count_common(folder, index),
        fingerprint=shards.content_fingerprint(folder, index),
    )
    index.write(folder)
    return index


def training_documents(source: Source, held_out: float = HELD_OUT) -> Iterator[str]:
    """Yield the training documents that are no validation documents, to make a tokenizer from."""
    if source.own_validation:
        excluded = {content_hash(text) for text in source.read("validation")}
        return (text for text in source.read("train") if content_hash(text) not in excluded)
    low = _limit(held_out)
    return (text for text in source.read("train") if content_hash(text) >= low)


def _limit(held_out: float) -> int:
    return int(held_out * HASHES)


def _stream(
    source: Source, folder: Path, index: Index, split: str, encode_all: EncodeAll
) -> TokenStream:
    """Return the stream of the tokens that belong to a split."""
    recipe, training = index.recipe, split == "train"
    chosen, excluded = Chosen(), None
    if recipe.held_out is not None:
        limit = _limit(recipe.held_out)
        chosen = Chosen(low=limit) if training else Chosen(high=limit)
    elif training:
        excluded = np.unique(
            np.concatenate(shards.map_files(folder, index, "validation", "hashes"))
        )
    return TokenStream(
        source,
        split if source.own_validation else "train",
        index.splits[split],
        encode_all,
        chosen,
        wanted=recipe.tokens if training else recipe.validation_tokens,
        excluded=excluded,
    )


def _write(folder: Path, index: Index, split: str, stream: TokenStream) -> Index:
    """Write the shards of a split that are missing, and the index after each."""
    while (first := stream.take(index.recipe.shard_tokens)) is not None:
        entry = index.splits[split]
        shard = _write_shard(
            folder, f"{split}-{len(entry.shards):05}", first, stream, index.recipe.shard_tokens
        )
        entry = SplitEntry((*entry.shards, shard), stream.read, position=stream.position)
        index = index.with_split(split, entry)
        index.write(folder)
    if not index.splits[split].shards:
        # Of no use then, validation included: `prepare` removes what has no index.
        (folder / INDEX).unlink(missing_ok=True)
        raise _empty(index.recipe, split, stream.read)
    entry = SplitEntry(index.splits[split].shards, stream.read, complete=True)
    index = index.with_split(split, entry)
    index.write(folder)
    return index


def _write_shard(
    folder: Path, name: str, piece: Piece | None, stream: TokenStream, shard_tokens: int
) -> Shard:
    """Write one shard, of `piece` and what follows it in the stream."""
    tokens, size = 0, 0
    ends, hashes = [], []
    path = folder / f"{name}.tokens"
    digest = hashlib.sha256()
    with files.disk_errors(folder), files.replacing(path) as temporary, temporary.open("wb") as out:
        while piece is not None:
            out.write(piece.tokens.data)
            digest.update(piece.tokens.data)
            tokens += len(piece.tokens)
            size += piece.bytes
            ends.append(piece.ends)
            hashes.append(piece.hashes)
            room = shard_tokens - tokens
            piece = stream.take(room) if room else None
    sha256 = {"tokens": digest.hexdigest()}
    with files.disk_errors(folder):
        for kind, arrays in (("ends", ends), ("hashes", hashes)):
            data = np.concatenate(arrays).astype(shards.DTYPES[kind]).tobytes()
            files.write_bytes(folder / f"{name}.{kind}", data)
            sha256[kind] = hashlib.sha256(data).hexdigest()
    return Shard(tokens, sum(map(len, ends)), size, sha256)


def _reporter(
    split: str, stream: TokenStream, on_progress: OnProgress | None
) -> Callable[[], None]:
    """Return what tells `on_progress` how far a stream is, unless it was told a moment ago."""
    before, began = stream.tokens, time.monotonic()
    told = began

    def report() -> None:
        nonlocal told
        now = time.monotonic()
        if on_progress is None or now - told < PROGRESS_SECONDS:
            return
        told = now
        rate = max(0, stream.tokens - before) / (now - began)
        wanted = stream.wanted
        left = None if wanted is None or not rate else max(0, wanted - stream.tokens) / rate
        speed = stream.bytes_read / (now - began)
        on_progress(Progress(split, stream.read, stream.tokens, wanted, rate, speed, left))

    return report


def _empty(recipe: Recipe, split: str, read: int) -> UserError:
    if recipe.held_out is None:
        return UserError(f"Corpus {recipe.source} has no documents for {split}.")
    if read < 2:
        return UserError(
            f"Corpus {recipe.source} has {'one document' if read else 'no documents'}; at least 2 "
            "are needed, since whole documents are held out for validation."
        )
    if split == "validation":
        return UserError(
            f"None of the {read:,} documents of {recipe.source} falls into the share of "
            f"{recipe.held_out:g} that is held out for validation; hold out a larger share."
        )
    return UserError(
        f"All {read:,} documents of {recipe.source} are held out; hold out a smaller share than "
        f"{recipe.held_out:g}."
    )


def _check(**values: int | None) -> None:
    for name, value in values.items():
        if value is not None and value < 1:
            raise UserError(f"{name} must be at least 1, not {value:,}.")
