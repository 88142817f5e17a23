"""From the name of a corpus to a source of its documents."""

from __future__ import annotations

import difflib
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from steepest.data.catalogue import Entry, corpora
from steepest.data.download import fetched
from steepest.data.embedded_source import EmbeddedSource
from steepest.data.file_source import open_files
from steepest.data.hub import ID, HubSource
from steepest.data.readers import SUFFIXES
from steepest.errors import UserError

__all__ = ["DocumentReader", "Entry", "Source", "corpora", "open_source"]


class DocumentReader(Protocol):
    """An iterator over documents (never blank, stripped of nothing) in a fixed order."""

    def __iter__(self) -> DocumentReader: ...

    def __next__(self) -> str: ...

    def state(self) -> dict[str, Any]:
        """Return the position behind the last document; it is made of what JSON knows."""


class Source(Protocol):
    """A corpus that can be read.

    `own_validation`: it has a validation split beside `train`. `fingerprint` (16 hex digits) is
    what identifies the content as far as it is known without reading it all.
    """

    @property
    def name(self) -> str: ...
    @property
    def licence(self) -> str: ...
    @property
    def description(self) -> str: ...
    @property
    def own_validation(self) -> bool: ...
    @property
    def fingerprint(self) -> str: ...

    def read(self, split: str, state: dict[str, Any] | None = None) -> DocumentReader:
        """Return the documents of `train` or `validation`, behind `state` if it is given.

        Raises UserError for a split that the source does not have.
        """


def open_source(corpus: str, *, text_column: str | None = None) -> Source:
    """Open a corpus by name.

    * A name of the catalogue; NAME:PLACE reads it from a local copy, a folder laid out as on the
      hub or the one file that it is.
    * `hf:ORG/NAME[:CONFIG]` or ORG/NAME[:CONFIG] of the Hugging Face Hub; `hf:FOLDER[:CONFIG]` for
      a copy.
    * A file or folder of .txt, .jsonl(.gz, .zst), .json.gz and .parquet files.

    `text_column` names the column of the text where it is not "text". Raises UserError when there
    is no such corpus or it has no columns to choose from.
    """
    catalogue = corpora()
    name, _, place = corpus.partition(":")
    if name in catalogue:
        return _from_catalogue(catalogue[name], text_column, place)
    if corpus.startswith("hf:"):
        return _from_hub(corpus.removeprefix("hf:"), text_column)
    path = Path(corpus).expanduser()
    if corpus and os.path.exists(path):  # False also of names too long for one
        return open_files(path, corpus, text_column)
    hub, _, _ = corpus.partition(":")
    if ID.fullmatch(hub) and not hub.endswith(SUFFIXES):
        return _from_hub(corpus, text_column)
    close = difflib.get_close_matches(corpus, catalogue, n=1, cutoff=0.5)
    hint = f" (did you mean {close[0]!r}?)" if close else f" ({', '.join(catalogue)})"
    raise UserError(
        f"Corpus {corpus!r} is neither a name of the catalogue{hint} nor an existing file or "
        "folder nor an id of the Hugging Face Hub (ORG/NAME)."
    )


def _from_hub(name: str, text_column: str | None) -> HubSource:
    hub, _, config = name.partition(":")
    return HubSource(name=name, hub=hub, config=config or None, column=text_column or "text")


def _from_catalogue(entry: Entry, text_column: str | None, place: str) -> Source:
    local = Path(place).expanduser()
    if place and not local.exists():
        raise UserError(f"There is no copy of corpus {entry.name} at {place}.")
    if entry.kind == "hub":
        return HubSource(
            name=entry.name,
            hub=place or entry.hub,
            config=entry.config,
            column=text_column or entry.column,
            files=entry.files,
            articles=entry.articles,
            licence=entry.licence,
            description=entry.title,
        )
    if text_column is not None:
        raise UserError(f"Corpus {entry.name} has no choice of columns, so no {text_column!r}.")
    if entry.kind == "file":
        return _fetched(entry, local if place else None)
    if place:
        raise UserError(f"Corpus {entry.name} cannot be read from {place}: give its name alone.")
    if entry.kind == "mix":
        parts = tuple(open_source(part) for part in entry.parts)
        return MixedSource(entry.name, parts, entry.licence, entry.title)
    return EmbeddedSource(entry)


def _fetched(entry: Entry, copy: Path | None) -> Source:
    # `tokens` holds the cache's place and stands above this module.
    from steepest.data.tokens import cache_folder

    file = copy or cache_folder() / "corpora" / f"{entry.name}.txt"
    file = fetched(entry.url, file, entry.sha256)
    source = open_files(file, entry.name, None)
    return replace(source, licence=entry.licence, description=entry.title)


@dataclass(frozen=True)
class MixedSource:
    """Several sources in turn, one document of each; those that have ended are passed over."""

    name: str
    parts: Sequence[Source]
    licence: str
    description: str

    @property
    def own_validation(self) -> bool:
        """Whether every part has a validation split: else validation would miss some."""
        return all(part.own_validation for part in self.parts)

    @property
    def fingerprint(self) -> str:
        """16 hex digits over those of the parts, in their order."""
        text = " ".join(part.fingerprint for part in self.parts)
        return hashlib.sha256(f"mix {text}".encode()).hexdigest()[:16]

    def read(self, split: str, state: dict[str, Any] | None = None) -> DocumentReader:
        """Return the documents of a split of every part in turn, from `state` on."""
        if split == "validation" and not self.own_validation:
            raise UserError(f"Corpus {self.name} has no validation split in all of its parts.")
        states = state["parts"] if state is not None else [None] * len(self.parts)
        readers = [part.read(split, own) for part, own in zip(self.parts, states, strict=True)]
        return _MixedReader(readers, state["turn"] if state is not None else 0)


class _MixedReader:
    def __init__(self, readers: Sequence[DocumentReader], turn: int) -> None:
        self._readers = readers
        self._turn = turn

    def __iter__(self) -> _MixedReader:
        return self

    def __next__(self) -> str:
        for _ in self._readers:
            reader = self._readers[self._turn]
            self._turn = (self._turn + 1) % len(self._readers)
            if (document := next(reader, None)) is not None:
                return document
        raise StopIteration

    def state(self) -> dict[str, Any]:
        return {"turn": self._turn, "parts": [reader.state() for reader in self._readers]}
