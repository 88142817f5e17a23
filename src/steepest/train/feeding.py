"""The batches of a run as its steps ask for them, made ahead on a GPU."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from types import TracebackType
from typing import Self

import torch

from steepest.data import Batch, Loader
from steepest.data.prefetch import Prefetcher
from steepest.train.batch_size import BatchSize
from steepest.train.evaluation import to_device
from steepest.train.parallel import Parallel

AHEAD_ON = ("cuda",)
"""Kinds of devices whose batches a thread makes ahead. On a CPU making one takes half a hundredth
of a small model's step, and a thread would take its time from the step."""


class Feed:
    """This process's rows of every step to come, on the device.

    On a GPU a thread makes them ahead, into pinned memory, so that no step waits for them. On a
    CPU, and where the norm test decides after a step how many rows the next one has, they are made
    when they are asked for. They are the same either way. Use it in a `with`, which ends the
    thread.
    """

    def __init__(
        self, loader: Loader, batch: BatchSize, parallel: Parallel, device: torch.device
    ) -> None:
        self._loader, self._batch = loader, batch
        self._parallel, self._device = parallel, device
        self._ahead: Prefetcher | None = None

    def __enter__(self) -> Self:
        if self._device.type in AHEAD_ON and self._batch.config.schedule != "norm_test":
            self._ahead = Prefetcher(self._make, self._to_come(), self._device)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._ahead is not None:
            self._ahead.close()

    def next(self) -> Batch:
        """Return the rows of the coming step."""
        if self._ahead is not None:
            return next(self._ahead)
        return to_device(self._make(self._place(self._batch)), self._device)

    def _make(self, place: tuple[int, int]) -> Batch:
        return self._loader.rows_from(*place)

    def _place(self, batch: BatchSize) -> tuple[int, int]:
        first, count = self._parallel.rows(batch.size)
        return batch.rows + first, count

    def _to_come(self) -> Iterator[tuple[int, int]]:
        batch = copy.copy(self._batch)
        while not batch.finished:
            yield self._place(batch)
            batch.advance()
