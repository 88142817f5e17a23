"""The corpora that come with the package as sources of documents."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from steepest.data.catalogue import Entry
from steepest.data.corpus import FIRST_HELD_OUT, HELD_OUT_EVERY, load_corpus
from steepest.errors import UserError


@dataclass(frozen=True)
class EmbeddedSource:
    """A corpus that comes with the package, split as `Corpus.split` does."""

    entry: Entry
    own_validation: bool = True

    @property
    def name(self) -> str:
        """The corpus's name in the catalogue."""
        return self.entry.name

    @property
    def licence(self) -> str:
        """The terms of its texts."""
        return self.entry.licence

    @property
    def description(self) -> str:
        """Its title."""
        return self.entry.title

    @property
    def fingerprint(self) -> str:
        """16 hex digits over the text's SHA-256 and what is held out."""
        rule = f"{FIRST_HELD_OUT} {HELD_OUT_EVERY}"
        return hashlib.sha256(f"embedded {self.entry.sha256} {rule}".encode()).hexdigest()[:16]

    def read(self, split: str, state: dict[str, Any] | None = None) -> ListReader:
        """Return the documents of `train` or `validation`, behind `state` if it is given."""
        training, validation = load_corpus(self.entry.name).split()
        documents = {"train": training, "validation": validation}
        if split not in documents:
            raise UserError(f"Corpus {self.name} has no {split} split; it has train, validation.")
        return ListReader(documents[split], state["document"] if state is not None else 0)


class ListReader:
    """Documents in memory; an iterator with a position."""

    def __init__(self, documents: Sequence[str], position: int) -> None:
        self._documents = documents
        self._position = position

    def __iter__(self) -> ListReader:
        return self

    def __next__(self) -> str:
        if self._position >= len(self._documents):
            raise StopIteration
        self._position += 1
        return self._documents[self._position - 1]

    def state(self) -> dict[str, Any]:
        """Return the position behind the last document."""
        return {"document": self._position}
