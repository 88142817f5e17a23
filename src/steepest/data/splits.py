"""One split's tokens and documents, in files that are mapped and never joined."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

Positions = npt.NDArray[np.int64]


class ShardedArray:
    """A one-dimensional array in parts, of which only what is asked for is read.

    It has a length, a `dtype`, and is indexed by a number, a slice without a step, or an int64
    array of numbers that are not negative. What comes back must not be written to.
    """

    def __init__(self, parts: Sequence[npt.NDArray[Any]]) -> None:
        # Plain views: indexing a numpy.memmap itself costs microseconds each time.
        filled = [np.asarray(part) for part in parts if len(part)]
        self.parts = filled or [np.asarray(parts[0])]
        self.bounds: Positions = np.cumsum([0, *map(len, self.parts)], dtype=np.int64)
        self.dtype = self.parts[0].dtype

    def __len__(self) -> int:
        return int(self.bounds[-1])

    def __getitem__(self, index: int | slice | Positions) -> Any:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step != 1:
                raise IndexError("Slices of a sharded array have no step.")
            return self._slice(start, max(start, stop))
        if isinstance(index, np.ndarray):
            return self._take(index)
        return self._take(np.array([range(len(self))[index]]))[0]

    def windows(self, starts: Positions, length: int) -> npt.NDArray[Any]:
        """Return [len(starts), length]: the elements from each start on, which must all exist."""
        windows = np.empty((len(starts), length), self.dtype)
        part = self._part_of(starts)
        inside = starts + length <= self.bounds[part + 1]
        for number in np.unique(part[inside]):
            chosen = inside & (part == number)
            view = np.lib.stride_tricks.sliding_window_view(self.parts[number], length)
            windows[chosen] = view[starts[chosen] - self.bounds[number]]
        for row in np.flatnonzero(~inside):
            windows[row] = self._slice(int(starts[row]), int(starts[row]) + length)
        return windows

    def count_up_to(self, values: Positions) -> Positions:
        """Return how many elements are at most each value. The array must ascend."""
        part = np.searchsorted(self._lasts, values, side="right")
        counts = self.bounds[part]
        for number in np.unique(part[part < len(self.parts)]):
            chosen = part == number
            counts[chosen] += np.searchsorted(self.parts[number], values[chosen], side="right")
        return counts

    @cached_property
    def _lasts(self) -> npt.NDArray[Any]:
        return np.array([part[-1] for part in self.parts if len(part)], dtype=self.dtype)

    def _part_of(self, index: Positions) -> Positions:
        return np.searchsorted(self.bounds, index, side="right") - 1

    def _slice(self, start: int, stop: int) -> npt.NDArray[Any]:
        first, last = self._part_of(np.array([start, max(start, stop - 1)]))
        pieces = [
            self.parts[number][max(0, start - base) : max(0, stop - base)]
            for number, base in enumerate(self.bounds[first : last + 1].tolist(), first)
            if number < len(self.parts)
        ]
        if not pieces:
            return np.empty(0, self.dtype)
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def _take(self, index: Positions) -> npt.NDArray[Any]:
        if len(self.parts) == 1:
            taken: npt.NDArray[Any] = self.parts[0][index]
            return taken
        part = self._part_of(index)
        taken = np.empty(index.shape, self.dtype)
        for number in np.unique(part):
            chosen = part == number
            taken[chosen] = self.parts[number][index[chosen] - self.bounds[number]]
        return taken


@dataclass(frozen=True, eq=False)
class TokenSplit:
    """The documents of one split, one after the other, each closed by the end-of-document token."""

    tokens: ShardedArray
    """Token ids, uint16 or uint32."""
    ends: ShardedArray
    """For each document the position after its end-of-document token, int64, ascending."""
    bytes: int
    """UTF-8 bytes of its documents, end-of-document tokens counting none."""

    def __len__(self) -> int:
        """Return the number of tokens."""
        return len(self.tokens)

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text that a token stands for on average: nats per token divided by it and
        by ln 2 are bits per byte.
        """
        return self.bytes / len(self.tokens)

    def document(self, number: int) -> npt.NDArray[Any]:
        """Return the tokens of one document, its end-of-document token included."""
        start = int(self.ends[number - 1]) if number else 0
        tokens: npt.NDArray[Any] = self.tokens[start : int(self.ends[number])]
        return tokens
