"""A prepared corpus on disk: shards of tokens, and the index that describes them.

    DIR/index.json                what it was made from, and an entry per shard
    DIR/tokenizer/                the tokenizer's files
    DIR/SPLIT-00000.tokens        token ids, little-endian uint16, or uint32 above 65,536 ids
    DIR/SPLIT-00000.ends          int64: for every document that ends in the shard, the position
                                  after its end-of-document token, counted from the split's start
    DIR/SPLIT-00000.hashes        uint64: for the same documents, the first 8 bytes of the SHA-256
                                  of the text, read as a big-endian number

SPLIT is train or validation. Every shard has `shard_tokens` tokens but the last, which has the
rest. A shard is there once the index names it: its three files are written before.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from steepest import files
from steepest.data.splits import ShardedArray, TokenSplit
from steepest.errors import UserError

FORMAT = 1
INDEX = "index.json"
SPLITS = ("train", "validation")
DTYPES = {"tokens": "", "ends": "<i8", "hashes": "<u8"}
"""The three files of a shard; the type of tokens depends on the vocabulary."""
AGAIN = "prepare the corpus again, into another folder."
"""What to do when it failed later."""


@dataclass(frozen=True)
class Recipe:
    """All that decides what is written: the source, the tokenizer, and what was asked for."""

    source: str
    """Name of the corpus."""
    licence: str
    source_description: str
    source_fingerprint: str
    tokenizer: str
    """Name of the tokenizer."""
    tokenizer_fingerprint: str
    vocab_size: int
    end: int
    """The end-of-document token."""
    shard_tokens: int
    """Tokens of a full shard."""
    tokens: int | None
    """Training tokens asked for; None for all there are."""
    validation_tokens: int | None
    """Validation tokens asked for; None for all there are."""
    held_out: float | None
    """Share of documents held out by their hash; None where the corpus has a split of its own."""

    @property
    def dtype(self) -> str:
        """The type of tokens on disk."""
        return "<u2" if self.vocab_size <= 2**16 else "<u4"


@dataclass(frozen=True)
class Position:
    """Where to go on reading a source: a state of its reader, and what to pass over from there."""

    state: dict[str, Any] | None = None
    """As `DocumentReader.state` gives it; None is the beginning."""
    documents: int = 0
    """Documents to pass over."""
    tokens: int = 0
    """Tokens of the document after those that are written already."""


@dataclass(frozen=True)
class Shard:
    """What the index says of a shard."""

    tokens: int
    documents: int
    """Documents that end in it."""
    bytes: int
    """UTF-8 bytes of these documents."""
    sha256: dict[str, str]
    """Of its files, by their suffixes."""


@dataclass(frozen=True)
class SplitEntry:
    """What the index says of a split."""

    shards: tuple[Shard, ...] = ()
    read: int = 0
    """Documents read to make the shards: those in them, and those left out because they belong to
    the other split."""
    complete: bool = False
    position: Position = field(default_factory=Position)
    """Where the source is read on while the split is not complete."""

    @property
    def tokens(self) -> int:
        """Tokens in all shards."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def documents(self) -> int:
        """Documents that end in the shards."""
        return sum(shard.documents for shard in self.shards)

    @property
    def bytes(self) -> int:
        """UTF-8 bytes of these documents."""
        return sum(shard.bytes for shard in self.shards)

    @property
    def left_out(self) -> int:
        """Documents read that belong to the other split."""
        return self.read - self.documents


@dataclass(frozen=True)
class Index:
    """The content of index.json."""

    recipe: Recipe
    splits: dict[str, SplitEntry] = field(
        default_factory=lambda: {name: SplitEntry() for name in SPLITS}
    )
    """By name: train and validation."""
    common_documents: int | None = None
    """Training documents that are also validation documents, counted at the end; always 0."""
    fingerprint: str = ""
    """Content hash of the documents of both splits, in order, and of the tokenizer; known at the
    end. The size of shards is not part of it."""

    @property
    def complete(self) -> bool:
        """Whether all that was asked for is there."""
        return bool(self.fingerprint)

    def with_split(self, name: str, entry: SplitEntry) -> Index:
        """Return the index with another entry for a split."""
        return dataclasses.replace(self, splits={**self.splits, name: entry})

    def write(self, folder: Path) -> None:
        """Write index.json atomically."""
        content = {"format": FORMAT, **dataclasses.asdict(self)}
        with files.disk_errors(folder):
            files.write_text(folder / INDEX, json.dumps(content, indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read index.json; raise UserError if there is none or it is not one."""
        path = folder / INDEX
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(
                f"{folder} is not a prepared corpus: it has no index.json; "
                "make one with `steepest data prepare`."
            ) from None
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read: {error}; {AGAIN}") from None
        try:
            return cls._from(content)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"{path} is damaged or of another version of steepest ({error}); {AGAIN}"
            ) from None

    @classmethod
    def _from(cls, content: dict[str, Any]) -> Self:
        if (found := content.pop("format")) != FORMAT:
            raise ValueError(f"format {found} instead of {FORMAT}")
        content["recipe"] = Recipe(**content["recipe"])
        content["splits"] = {name: _entry(content["splits"][name]) for name in SPLITS}
        return cls(**content)


def _entry(content: dict[str, Any]) -> SplitEntry:
    shards = tuple(Shard(**shard) for shard in content.pop("shards"))
    return SplitEntry(shards=shards, position=Position(**content.pop("position")), **content)


def is_prepared(folder: Path) -> bool:
    """Return whether a preparation has come as far as an index in the folder."""
    try:
        return (folder / INDEX).is_file()
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return False
        raise


def path_of(folder: Path, split: str, number: int, kind: str) -> Path:
    """Return where a shard's "tokens", "ends" or "hashes" are."""
    return folder / f"{split}-{number:05}.{kind}"


def map_split(folder: Path, index: Index, name: str) -> TokenSplit:
    """Return a split whose files are mapped; raise UserError as `map_files` does."""
    return TokenSplit(
        tokens=ShardedArray(map_files(folder, index, name, "tokens")),
        ends=ShardedArray(map_files(folder, index, name, "ends")),
        bytes=index.splits[name].bytes,
    )


def map_files(folder: Path, index: Index, split: str, kind: str) -> list[npt.NDArray[Any]]:
    """Return "tokens", "ends" or "hashes" of a split, mapped, an array per shard (at least one).

    Raises UserError if a file is missing or has another length than it should.
    """
    dtype = np.dtype(DTYPES[kind] or index.recipe.dtype)
    arrays: list[npt.NDArray[Any]] = []
    for number, shard in enumerate(index.splits[split].shards):
        path = path_of(folder, split, number, kind)
        length = shard.tokens if kind == "tokens" else shard.documents
        size = path.stat().st_size if path.exists() else -1
        if size != length * dtype.itemsize:
            found = f"has {size:,} bytes instead of" if size >= 0 else "is missing; it should have"
            raise UserError(f"{path} {found} {length * dtype.itemsize:,}; restore it or {AGAIN}")
        arrays.append(np.memmap(path, dtype, mode="r") if length else np.empty(0, dtype))
    return arrays or [np.empty(0, dtype)]


def content_fingerprint(folder: Path, index: Index) -> str:
    """Return the 16 hexadecimal digits that stand for documents, their order and the tokenizer."""
    digest = hashlib.sha256(index.recipe.tokenizer_fingerprint.encode())
    for name in SPLITS:
        digest.update(f"\n{name} {index.splits[name].documents}\n".encode())
        for hashes in map_files(folder, index, name, "hashes"):
            digest.update(hashes.data)
    return digest.hexdigest()[:16]


def count_common(folder: Path, index: Index) -> int:
    """Return how many training documents have the content hash of a validation document."""
    held_out = np.unique(np.concatenate(map_files(folder, index, "validation", "hashes")))
    training = map_files(folder, index, "train", "hashes")
    return sum(int(np.isin(hashes, held_out).sum()) for hashes in training)
