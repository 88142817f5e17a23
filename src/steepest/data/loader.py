"""Batches: training rows in an order set by seed and step alone, validation in a fixed one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from steepest.data import packing as packed
from steepest.data.order import epoch_order
from steepest.data.packing import Batch, Packing
from steepest.data.splits import Positions, TokenSplit
from steepest.errors import UserError

CONTIGUOUS = Packing()


@dataclass(frozen=True)
class Loader:
    """The training batches of a split: any row of any step, at once.

    An epoch visits each row of the split once, in a random order; of windows, those that do not
    overlap, from a random offset. A batch may end one epoch and begin the next. A row is a pure
    function of the fields, the step and its place in the batch, and making it takes the same time
    whatever the step. Raises UserError when the split does not fill one batch.
    """

    split: TokenSplit
    """The training split."""
    batch_size: int
    """Rows per step, over all processes and microbatches."""
    sequence_length: int
    """Tokens per row."""
    seed: int
    """Seed of the order; not negative."""
    packing: Packing = CONTIGUOUS
    """How documents become rows."""

    def __post_init__(self) -> None:
        _check_positive(batch_size=self.batch_size, sequence_length=self.sequence_length)
        if self.seed < 0:
            raise UserError(f"seed must not be negative, but it is {self.seed}.")
        if self.rows_per_epoch < self.batch_size:
            raise UserError(
                f"The training split has {len(self.split):,} tokens in {len(self.split.ends):,} "
                f"documents, which make {self.rows_per_epoch} sequences of {self.sequence_length}, "
                f"but a batch needs {self.batch_size}; use a larger corpus, a smaller batch or "
                "shorter sequences."
            )

    @property
    def rows_per_epoch(self) -> int:
        """Rows of an epoch: of windows, as many as fit behind the largest offset."""
        largest = self.sequence_length - 1
        return packed.count(self.split, self.packing, self.sequence_length, offset=largest)

    def rows(self, step: int, first: int = 0, count: int | None = None) -> Batch:
        """Return `count` rows of the batch of a step, from row `first` on; by default all of them.

        Steps are optimizer steps, from 0. Process r of w, in microbatch m of n, takes the rows
        that are its share; together they have the batch that one process would have.
        """
        count = self.batch_size - first if count is None else count
        if step < 0 or first < 0 or count < 1 or first + count > self.batch_size:
            raise UserError(
                f"Step {step} has no rows {first} to {first + count - 1}; steps count from 0, and "
                f"the rows of a batch are 0 to {self.batch_size - 1}."
            )
        return self.rows_from(step * self.batch_size + first, count)

    def rows_from(self, row: int, count: int) -> Batch:
        """Return `count` rows, at least 1, from a row on; rows count from 0 over all epochs.

        It is for batches of changing size; row `first` of a step is step * batch_size + first.
        """
        size = self.rows_per_epoch
        parts = []
        while count > 0:
            # Python's integers: the place in the order may exceed 64 bits.
            epoch, place = divmod(row, size)
            taken = min(count, size - place)
            parts.append(self._take(epoch, np.arange(place, place + taken)))
            row, count = row + taken, count - taken
        return parts[0] if len(parts) == 1 else _joined(parts)

    def _take(self, epoch: int, places: Positions) -> Batch:
        order = epoch_order(self.seed, epoch, self.rows_per_epoch)
        offset = order.draw % self.sequence_length
        units = order.units(places)
        return packed.take(self.split, self.packing, units, self.sequence_length, offset=offset)


def validation_batches(
    split: TokenSplit,
    *,
    batch_size: int,
    sequence_length: int,
    max_tokens: int | None,
    packing: Packing = CONTIGUOUS,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Batch]:
    """Return an iterator over batches of at most `batch_size` rows in a fixed order.

    With `max_tokens`, only as many rows as fit are used, evenly spread over the split, so that a
    short evaluation sees every document's share. A rest of less than a window is left out. Process
    `rank` of `world_size` gets every world_size-th batch, and possibly none.

    Losses become bits per byte by `split.bytes_per_token`: a target, whichever it is, stands for
    the split's average bytes per token. Where all tokens are targets that is exact; where rows are
    cut, borders masked or only some rows used, it is an estimate.

    Raises UserError when there is not one row to evaluate.
    """
    _check_positive(batch_size=batch_size, sequence_length=sequence_length)
    if not 0 <= rank < world_size:
        raise UserError(f"rank must be from 0 to {world_size - 1}, not {rank}.")
    rows = packed.count(split, packing, sequence_length)
    if rows < 1:
        raise UserError(
            f"The validation split has {len(split)} tokens, too few for one sequence of "
            f"{sequence_length} and its next token; use a larger corpus or shorter sequences."
        )
    used = rows
    if max_tokens is not None:
        used = min(rows, max_tokens // sequence_length)
        if used < 1:
            raise UserError(
                f"Evaluating on at most {max_tokens} tokens leaves no sequence of "
                f"{sequence_length}; evaluate on at least {sequence_length}."
            )
    units = np.arange(used, dtype=np.int64) * rows // used
    return (
        packed.take(split, packing, units[first : first + batch_size], sequence_length)
        for first in range(rank * batch_size, used, world_size * batch_size)
    )


def _joined(parts: list[Batch]) -> Batch:
    documents = [part.documents for part in parts if part.documents is not None]
    return Batch(
        torch.cat([part.tokens for part in parts]),
        torch.cat([part.targets for part in parts]),
        torch.cat(documents) if documents else None,
    )


def _check_positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise UserError(f"{name} must be at least 1, not {value}.")
