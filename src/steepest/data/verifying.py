"""Whether a prepared corpus is what its index says, by reading all of it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from steepest.data import shards
from steepest.data.encoding import HASHES
from steepest.data.shards import AGAIN, DTYPES, SPLITS, Index, path_of
from steepest.data.tokenizers import Tokenizer, load_tokenizer
from steepest.errors import UserError

TOKENS_AT_ONCE = 2**24


def verify(folder: Path, on_shard: Callable[[int], None] = lambda tokens: None) -> Index:
    """Check a complete corpus and return its index.

    Checked are the checksums and lengths of all files, that the tokenizer is the one that made
    them, that tokens are below the vocabulary's size, that every document ends with the
    end-of-document token where it should, that no training document is a validation document, that
    held-out documents are those that their hashes hold out, and the fingerprint. `on_shard` is told
    the tokens of each shard that was checked. Raises UserError naming the first thing that is
    wrong.
    """
    index = Index.read(folder)
    tokenizer_of(folder, index)
    for name in SPLITS:
        for number, shard in enumerate(index.splits[name].shards):
            for kind in DTYPES:
                _check_sum(path_of(folder, name, number, kind), shard.sha256[kind])
            on_shard(shard.tokens)
        _check_split(folder, index, name)
        _check_sides(folder, index, name)
    if common := shards.count_common(folder, index):
        raise _wrong(folder, f"{common:,} training documents are validation documents")
    if index.fingerprint and index.fingerprint != shards.content_fingerprint(folder, index):
        raise _wrong(folder, "the fingerprint in index.json is not that of its documents")
    return index


def tokenizer_of(folder: Path, index: Index) -> Tokenizer:
    """Return the tokenizer that is kept with the shards; raise UserError if it is another."""
    tokenizer = load_tokenizer(folder / "tokenizer")
    if tokenizer.fingerprint != index.recipe.tokenizer_fingerprint:
        raise UserError(
            f"The tokenizer in {folder / 'tokenizer'} ({tokenizer.name}, {tokenizer.fingerprint}) "
            f"is not the one that made the shards ({index.recipe.tokenizer}, "
            f"{index.recipe.tokenizer_fingerprint}); restore it or {AGAIN}"
        )
    return tokenizer


def _check_sum(path: Path, expected: str) -> None:
    try:
        with path.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    if found != expected:
        raise UserError(
            f"{path} is damaged: its SHA-256 is {found} instead of {expected}; "
            f"restore it or {AGAIN}"
        )


def _check_split(folder: Path, index: Index, name: str) -> None:
    split = shards.map_split(folder, index, name)
    entry, recipe = index.splits[name], index.recipe
    short = [shard.tokens for shard in entry.shards[:-1] if shard.tokens != recipe.shard_tokens]
    if short or any(not 0 < shard.tokens <= recipe.shard_tokens for shard in entry.shards[-1:]):
        raise _wrong(folder, f"shards of {name} don't have {recipe.shard_tokens:,} tokens each")
    begun = 0
    every = shards.map_files(folder, index, name, "ends")
    for number, (shard, ends) in enumerate(zip(entry.shards, every, strict=False)):
        path = path_of(folder, name, number, "ends")
        if len(ends) and not (begun < ends[0] and ends[-1] <= begun + shard.tokens):
            raise _wrong(path, "it has document ends outside its shard")
        if (np.diff(ends) <= 0).any():
            raise _wrong(path, "document ends do not ascend")
        if (split.tokens[ends - 1] != recipe.end).any():
            raise _wrong(path, "a document does not end with the end-of-document token")
        begun += shard.tokens
    if entry.complete and (not len(split.ends) or int(split.ends[-1]) != len(split)):
        raise _wrong(folder, f"the last tokens of {name} belong to no document")
    for start in range(0, len(split), TOKENS_AT_ONCE):
        if split.tokens[start : start + TOKENS_AT_ONCE].max() >= recipe.vocab_size:
            raise _wrong(folder, f"{name} has tokens outside the vocabulary")


def _check_sides(folder: Path, index: Index, name: str) -> None:
    """Check that hashes, where they decide, are on the split's side of the share held out."""
    if index.recipe.held_out is None:
        return
    limit = int(index.recipe.held_out * HASHES)
    for hashes in shards.map_files(folder, index, name, "hashes"):
        held_out = hashes < np.uint64(limit)
        if (held_out if name == "train" else ~held_out).any():
            raise _wrong(folder, f"a document of {name} belongs to the other split by its hash")


def _wrong(where: Path, what: str) -> UserError:
    return UserError(f"{where} is damaged or was not made by steepest: {what}.")
