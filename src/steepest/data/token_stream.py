"""A source's documents as one stream of tokens that always knows where it is in the source."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from steepest.data.encoding import Chosen, EncodeAll, Encoded, nothing
from steepest.data.shards import Position, SplitEntry
from steepest.errors import UserError

if TYPE_CHECKING:
    from steepest.data.sources import Source

BATCH_CHARACTERS = 2**20
BATCH_DOCUMENTS = 1024
"""A batch of documents ends with the one that reaches either number."""


@dataclass(frozen=True)
class Piece:
    """Some consecutive tokens of a split, and the documents that end in them."""

    tokens: npt.NDArray[np.unsignedinteger]
    ends: npt.NDArray[np.int64]
    """Position after each document's end-of-document token, from the start of the split."""
    hashes: npt.NDArray[np.uint64]
    bytes: int


class TokenStream:
    """The tokens of a split from where its entry in the index left off, in pieces of any length.

    `wanted`: the stream ends with the document by which the split has so many tokens.
    `excluded`: sorted content hashes of documents to leave out. Raises UserError
    if the source cannot be read, or is not what it was when the entry was made.
    """

    def __init__(
        self,
        source: Source,
        split: str,
        entry: SplitEntry,
        encode_all: EncodeAll,
        chosen: Chosen,
        *,
        wanted: int | None = None,
        excluded: npt.NDArray[np.uint64] | None = None,
    ) -> None:
        self.source, self.wanted, self.excluded = source, wanted, excluded
        self.on_batch: Callable[[], None] = lambda: None
        """Called after every batch of documents that was read."""
        self.bytes_read = 0
        """UTF-8 bytes of the documents read so far, including those left out."""
        self._places: deque[Position] = deque()
        self._encoded = encode_all(self._texts(split, entry.position), chosen)
        self._pass_over = entry.position.tokens
        self._at = 0
        self._open(entry.position, nothing(), entry.tokens - self._pass_over, entry.read)

    @property
    def tokens(self) -> int:
        """Tokens of the split up to here."""
        return self._start + self._at

    @property
    def read(self) -> int:
        """Documents of the source up to here, including those left out."""
        return self._read + self._done()[0]

    @property
    def position(self) -> Position:
        """Where a new stream would go on."""
        documents, tokens = self._done()
        return Position(self._place.state, self._place.documents + documents, tokens)

    def take(self, room: int) -> Piece | None:
        """Return the next tokens, at least 1 and at most `room`; None at the end of the stream."""
        while self._at == len(self._batch.tokens):
            if not self._advance():
                return None
        stop = min(self._at + room, len(self._batch.tokens))
        first, last = np.searchsorted(self._ends, np.array([self._at, stop]), side="right")
        piece = Piece(
            self._batch.tokens[self._at : stop],
            self._start + self._ends[first:last],
            self._batch.hashes[first:last],
            int(self._batch.sizes[first:last].sum()),
        )
        self._at = stop
        return piece

    def _done(self) -> tuple[int, int]:
        """Return the documents of the batch that are behind, and the tokens taken of the next."""
        ended = int(np.searchsorted(self._ends, self._at, side="right"))
        if ended == len(self._ends):
            return self._batch.read, 0
        begun = int(self._ends[ended - 1]) if ended else 0
        return int(self._batch.places[ended]), self._at - begun

    def _open(self, place: Position, batch: Encoded, start: int, read: int) -> None:
        self._place, self._batch, self._start, self._read = place, batch, start, read
        self._ends: npt.NDArray[np.int64] = np.cumsum(batch.lengths)
        self._at = 0

    def _advance(self) -> bool:
        """Go on to the next batch; return False if the stream is at its end."""
        start, read = self._start + len(self._batch.tokens), self._read + self._batch.read
        enough = self.wanted is not None and start >= self.wanted
        batch = None if enough else next(self._encoded, None)
        if batch is None:
            if self._pass_over:
                raise self._changed()
            return False
        self.bytes_read += batch.bytes_read
        self._open(self._places.popleft(), self._limited(self._allowed(batch), start), start, read)
        if self._pass_over:  # of the first document, which begins in a shard that is complete
            first = self._batch.places[:1].tolist()
            if first != [0] or self._batch.lengths[0] <= self._pass_over:
                raise self._changed()
            self._at, self._pass_over = self._pass_over, 0
        self.on_batch()
        return True

    def _allowed(self, batch: Encoded) -> Encoded:
        if self.excluded is None or not len(self.excluded):
            return batch
        nearest = np.searchsorted(self.excluded, batch.hashes).clip(max=len(self.excluded) - 1)
        return batch.select(self.excluded[nearest] != batch.hashes)

    def _limited(self, batch: Encoded, start: int) -> Encoded:
        if self.wanted is None or start + len(batch.tokens) < self.wanted:
            return batch
        last = int(np.searchsorted(np.cumsum(batch.lengths), self.wanted - start))
        kept = batch.select(np.arange(len(batch.lengths)) <= last)
        return dataclasses.replace(kept, read=int(batch.places[last]) + 1)

    def _texts(self, split: str, position: Position) -> Iterator[list[str]]:
        """Yield batches of texts, and remember the place in the source of each."""
        reader = self.source.read(split, position.state)
        texts = _reading(self.source.name, reader)
        if sum(1 for _ in islice(texts, position.documents)) < position.documents:
            raise self._changed()
        place, batch, size = dataclasses.replace(position, tokens=0), [], 0
        for text in texts:
            batch.append(text)
            size += len(text)
            if size >= BATCH_CHARACTERS or len(batch) == BATCH_DOCUMENTS:
                after = Position(reader.state())
                self._places.append(place)
                yield batch
                place, batch, size = after, [], 0
        if batch:
            self._places.append(place)
            yield batch

    def _changed(self) -> UserError:
        return UserError(
            f"Corpus {self.source.name} is not what it was when its preparation began; "
            "prepare it again, into another folder."
        )


def _reading(name: str, reader: Iterator[str]) -> Iterator[str]:
    """Yield what the reader does; an error of a disk or network becomes a sentence."""
    try:
        yield from reader
    except OSError as error:
        raise UserError(
            f"Corpus {name} cannot be read on: {error}; the same command continues."
        ) from error
