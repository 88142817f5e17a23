"""From documents to rows of equal length, and which of their tokens are predicted.

contiguous  Windows over the stream of documents. A row may hold the end of one document and the
            beginning of the next, and everything in it sees everything before.
documents   The same windows, with the number of each token's document, by which models reset
            attention, recurrent state and positions. The first token of a document is not
            predicted: nothing before it belongs to it. With a `context`, a document is cut into
            pieces of so many tokens that do not see each other, counted from where it begins in
            the row (32,768 tokens a row with a context of 4,096 is a usual choice). The first
            token of a piece is predicted, from the piece before it: its document goes on.
rows        A document per row, as C4 runs of the low-rank literature have it: cut to
            `sequence_length` tokens of which the last is the end-of-document token, also where
            text was cut off, or padded to them. What was cut off is not used; the end of a row
            and padding predict nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from steepest.data.splits import Positions, TokenSplit
from steepest.errors import UserError, unknown

Mode = Literal["contiguous", "documents", "rows"]

IGNORED = -100
"""Target where there is no loss; `torch.nn.functional.cross_entropy` ignores it by default."""

PADDING = 0
"""Token of padding. Which one it is makes no difference: nothing that counts comes after it."""


@dataclass(frozen=True)
class Batch:
    """Rows of tokens and what they predict."""

    tokens: Tensor
    """int64 [batch, time]."""
    targets: Tensor
    """int64 [batch, time]: the token that follows, or -100 where there is no loss."""
    documents: Tensor | None = None
    """int32 [batch, time], from 0 in each row and one more from each document, or piece of one, to
    the next; None where documents are not told apart."""


@dataclass(frozen=True)
class Packing:
    """How documents become rows; see `steepest.data.packing`."""

    mode: Mode = "contiguous"
    """contiguous, documents or rows."""
    context: int | None = None
    """Longest piece of a document whose tokens see each other; for documents only."""

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise unknown("packing", self.mode, get_args(Mode))
        if self.context is None:
            return
        if self.mode != "documents":
            raise UserError(f"A context goes with packing 'documents', not {self.mode!r}.")
        if self.context < 1:
            raise UserError(f"context must be at least 1, not {self.context}.")


def count(split: TokenSplit, packing: Packing, sequence_length: int, *, offset: int = 0) -> int:
    """Return how many rows the split makes; of windows, those that fit behind `offset` tokens.

    A window of `sequence_length` needs one token more, its last target.
    """
    if packing.mode == "rows":
        return len(split.ends)
    return max(0, (len(split) - 1 - offset) // sequence_length)


def take(
    split: TokenSplit, packing: Packing, units: Positions, sequence_length: int, *, offset: int = 0
) -> Batch:
    """Return the rows with these numbers, in [0, count). `offset` tokens are passed over first."""
    if packing.mode == "rows":
        return _document_rows(split, units, sequence_length)
    starts = units * sequence_length + offset
    windows = split.tokens.windows(starts, sequence_length + 1)
    # Two copies: the views of a single row would share memory.
    tokens, targets = (
        torch.from_numpy(part.astype(np.int64)) for part in (windows[:, :-1], windows[:, 1:])
    )
    if packing.mode == "contiguous":
        return Batch(tokens, targets)
    begins = _begins(split, starts, sequence_length + 1)
    targets.masked_fill_(torch.from_numpy(begins[:, 1:]), IGNORED)
    numbers = _numbers(begins[:, :-1], packing.context)
    return Batch(tokens, targets, torch.from_numpy(numbers))


def _begins(split: TokenSplit, starts: Positions, length: int) -> npt.NDArray[np.bool_]:
    """Return bool [len(starts), length]: whether a token is the first of its document."""
    first = split.ends.count_up_to(starts - 1)
    counts = split.ends.count_up_to(starts + length - 1) - first
    rows = np.repeat(np.arange(len(starts)), counts)
    within = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    begins = np.zeros((len(starts), length), dtype=bool)
    begins[rows, split.ends[first[rows] + within] - starts[rows]] = True
    return begins


def _numbers(begins: npt.NDArray[np.bool_], context: int | None) -> npt.NDArray[np.int32]:
    """Return int32, like `begins`: the number of each token's document or piece of one."""
    begins = begins.copy()
    begins[:, 0] = True
    if context is not None:
        place = np.arange(begins.shape[1])
        began = np.maximum.accumulate(np.where(begins, place, 0), axis=1)
        begins |= (place - began) % context == 0
    return np.cumsum(begins, axis=1, dtype=np.int32) - 1


def _document_rows(split: TokenSplit, documents: Positions, length: int) -> Batch:
    starts = np.where(documents > 0, split.ends[np.maximum(documents - 1, 0)], 0)
    stops = split.ends[documents]
    used = np.minimum(stops - starts, length)[:, None]
    tokens = np.empty((len(documents), length), dtype=np.int64)
    fits = starts + length <= len(split)
    tokens[fits] = split.tokens.windows(starts[fits], length)
    for row in np.flatnonzero(~fits):  # the last documents, behind which there are no tokens
        tokens[row, : used[row, 0]] = split.tokens[starts[row] : starts[row] + used[row, 0]]
    place = np.arange(length)
    tokens[place >= used] = PADDING
    tokens[place == used - 1] = split.tokens[stops - 1]
    targets = np.full_like(tokens, IGNORED)
    targets[:, :-1] = tokens[:, 1:]
    targets[place >= used - 1] = IGNORED
    return Batch(torch.from_numpy(tokens), torch.from_numpy(targets))
