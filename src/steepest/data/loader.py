"""Batches: training windows in an order set by seed and step alone, validation in a fixed one."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from steepest.data.tokens import Tokens
from steepest.errors import UserError


def batch(
    tokens: Tokens, *, seed: int, step: int, batch_size: int, sequence_length: int
) -> tuple[Tensor, Tensor]:
    """Return inputs and next-token targets, int64 [batch_size, sequence_length], of one step.

    An epoch cuts the tokens into windows that do not overlap, from a random offset, and visits
    each once in a random order; a batch may end one epoch and begin the next. The result is a pure
    function of the arguments, with the random bits of numpy's Philox, which are the same in every
    version. `step` counts batches from 0: with gradient accumulation, microbatches. Raises
    UserError when the tokens do not fill one batch.
    """
    windows = _check_batch(tokens, seed, step, batch_size, sequence_length)
    first = step * batch_size
    starts = np.empty(batch_size, dtype=np.int64)
    filled = 0
    while filled < batch_size:
        epoch, position = divmod(first + filled, windows)
        part = _starts(seed, epoch, windows, sequence_length)[position:][: batch_size - filled]
        starts[filled : filled + len(part)] = part
        filled += len(part)
    return _gather(tokens, starts, sequence_length)


def validation_batches(
    tokens: Tokens, *, batch_size: int, sequence_length: int, max_tokens: int | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Return an iterator over batches [<= batch_size, sequence_length] in a fixed order.

    Windows do not overlap. With `max_tokens`, only as many windows as fit are used, evenly spread
    over the tokens, so that a short evaluation sees every document's share. A rest of less than a
    window is left out. Raises UserError when there is not one window to evaluate.
    """
    _check_positive(batch_size=batch_size, sequence_length=sequence_length)
    windows = (len(tokens) - 1) // sequence_length
    if windows < 1:
        raise UserError(
            f"The validation split has {len(tokens)} tokens, too few for one sequence of "
            f"{sequence_length} and its next token; use a larger corpus or shorter sequences."
        )
    used = windows
    if max_tokens is not None:
        used = min(windows, max_tokens // sequence_length)
        if used < 1:
            raise UserError(
                f"Evaluating on at most {max_tokens} tokens leaves no sequence of "
                f"{sequence_length}; evaluate on at least {sequence_length}."
            )
    starts = np.arange(used, dtype=np.int64) * windows // used * sequence_length
    return (
        _gather(tokens, starts[first : first + batch_size], sequence_length)
        for first in range(0, used, batch_size)
    )


def windows_per_epoch(tokens: Tokens, sequence_length: int) -> int:
    """Return how many windows an epoch has: as many as fit behind the largest offset."""
    return max(0, (len(tokens) - sequence_length) // sequence_length)


@lru_cache(maxsize=4)
def _starts(seed: int, epoch: int, windows: int, sequence_length: int) -> npt.NDArray[np.int64]:
    """Return the first token of each window of an epoch, in the epoch's order (read-only)."""
    bits = np.random.Philox(np.random.SeedSequence([seed, epoch]))
    offset = int(bits.random_raw()) % sequence_length
    order = np.argsort(bits.random_raw(windows), kind="stable")
    starts: npt.NDArray[np.int64] = order.astype(np.int64) * sequence_length + offset
    starts.setflags(write=False)
    return starts


def _gather(
    tokens: Tokens, starts: npt.NDArray[np.int64], sequence_length: int
) -> tuple[Tensor, Tensor]:
    positions = starts[:, None] + np.arange(sequence_length + 1)
    windows = torch.from_numpy(np.asarray(tokens)[positions].astype(np.int64))
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def _check_batch(
    tokens: Tokens, seed: int, step: int, batch_size: int, sequence_length: int
) -> int:
    """Return the number of windows in an epoch once the arguments are known to be usable."""
    _check_positive(batch_size=batch_size, sequence_length=sequence_length)
    if seed < 0 or step < 0:
        raise UserError(f"seed and step must not be negative, but they are {seed} and {step}.")
    windows = windows_per_epoch(tokens, sequence_length)
    if windows < batch_size:
        raise UserError(
            f"The training split has {len(tokens):,} tokens, which make {windows} sequences of "
            f"{sequence_length}, but a batch needs {batch_size}; use a larger corpus, a smaller "
            "batch or shorter sequences."
        )
    return windows


def _check_positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise UserError(f"{name} must be at least 1, not {value}.")
