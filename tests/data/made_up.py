"""Documents made up for tests, and a source of them in memory."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from steepest.data.splits import ShardedArray, TokenSplit

WORDS = ["alpha", "béta", "gamma", "δ", "delta", "epsilon", "zeta", "iota", "数", "kappa", "mu"]


def texts(count: int, *, seed: int = 0, longest: int = 60) -> list[str]:
    """Return distinct texts of 1 to `longest` words, each with its number."""
    rng = random.Random(seed)
    return [
        f"{seed}.{number} " + " ".join(rng.choices(WORDS, k=rng.randint(1, longest)))
        for number in range(count)
    ]


class ListReader:
    """Documents of a list, from a position on."""

    def __init__(self, documents: Sequence[str], position: int) -> None:
        self.documents, self.position = documents, position

    def __iter__(self) -> ListReader:
        return self

    def __next__(self) -> str:
        if self.position >= len(self.documents):
            raise StopIteration
        self.position += 1
        return self.documents[self.position - 1]

    def state(self) -> dict[str, Any]:
        return {"position": self.position}


@dataclass(frozen=True)
class ListSource:
    """A corpus in memory; with `validation`, one that has a split of its own."""

    documents: Sequence[str]
    validation: Sequence[str] | None = None
    name: str = "made-up"
    licence: str = "CC0"
    description: str = "Made up for a test"

    @property
    def own_validation(self) -> bool:
        return self.validation is not None

    @property
    def fingerprint(self) -> str:
        text = "\0".join([*self.documents, "\1", *(self.validation or ())])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def read(self, split: str, state: dict[str, Any] | None = None) -> ListReader:
        documents = self.documents if split == "train" else self.validation
        assert documents is not None
        return ListReader(documents, state["position"] if state else 0)


def split_of(lengths: Sequence[int], *, parts: Sequence[int] = (), end: int = 999) -> TokenSplit:
    """Return a split of documents of these lengths, `end` included, cut into parts after `parts`.

    Every token but the last of a document is its position in the split, plus 1000.
    """
    ends = np.cumsum(lengths)
    tokens = np.arange(ends[-1], dtype=np.uint16) + 1000
    tokens[ends - 1] = end
    cuts = np.searchsorted(ends, parts, side="right")
    return TokenSplit(
        ShardedArray(np.split(tokens, parts)),
        ShardedArray(np.split(ends, cuts)),
        bytes=int(ends[-1]) * 3,
    )


def contents(folder: Path) -> dict[str, bytes]:
    """What a folder holds, the lock aside."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".steepest-lock"
    }
