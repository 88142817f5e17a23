"""Batches made ahead of time by a thread, and copied to a GPU without waiting for it."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Self, TypeVar

import torch
from torch import Tensor

from steepest.data.packing import Batch

Step = TypeVar("Step")

DEPTH = 3
"""Batches that may be ready before they are asked for."""


class Prefetcher:
    """An iterator over `make(step)` for each step, whatever says which, in order, on `device`.

    A thread calls `make` and keeps at most `DEPTH` batches ready. For a CUDA device it puts them
    into pinned buffers that are used again once the copy out of them is done on the GPU, so that
    the copy runs beside the GPU's work and the host may run ahead. What `make` raises is raised
    where its batch would have come. Use it in a `with`, or `close` it: that ends the thread.
    """

    def __init__(
        self, make: Callable[[Step], Batch], steps: Iterable[Step], device: torch.device
    ) -> None:
        self._device = device
        # What the thread fills, and gets back: batches on the CPU, buffers with CUDA.
        self._free: queue.SimpleQueue[_Buffer | None] = queue.SimpleQueue()
        self._ready: queue.SimpleQueue[Batch | _Buffer | BaseException] = queue.SimpleQueue()
        self._closed = threading.Event()
        for _ in range(DEPTH):
            self._free.put(_Buffer() if device.type == "cuda" else None)
        # A daemon: it must not keep a process that forgot to close this from ending.
        self._thread = threading.Thread(
            target=self._fill, args=(make, iter(steps)), name="prefetch", daemon=True
        )
        self._thread.start()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        """Return the next batch."""
        if self._closed.is_set():
            raise StopIteration
        found = self._ready.get()
        if isinstance(found, BaseException):
            self.close()
            raise found
        batch = found.copy_to(self._device) if isinstance(found, _Buffer) else found
        self._free.put(found if isinstance(found, _Buffer) else None)
        return batch

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the thread, after the batch it is at."""
        self._closed.set()
        self._free.put(None)  # wakes it
        self._thread.join()

    def _fill(self, make: Callable[[Step], Batch], steps: Iterator[Step]) -> None:
        try:
            if self._device.type == "cuda":  # pinning would make a context on the first GPU
                torch.cuda.set_device(self._device)
            for step in steps:
                buffer = self._free.get()
                if self._closed.is_set():
                    return
                batch = make(step)
                self._ready.put(batch if buffer is None else buffer.fill(batch))
            self._ready.put(StopIteration())
        except BaseException as error:
            self._ready.put(error)


class _Buffer:
    """Pinned memory for one batch, and the event behind the last copy out of it."""

    def __init__(self) -> None:
        self._pinned: list[Tensor | None] = [None, None, None]
        self._copied: torch.cuda.Event | None = None

    def fill(self, batch: Batch) -> Self:
        """Copy a batch in, when nothing is copied out any more."""
        if self._copied is not None:
            self._copied.synchronize()
        parts = (batch.tokens, batch.targets, batch.documents)
        self._pinned = [
            None if part is None else _pinned(part, room)
            for part, room in zip(parts, self._pinned, strict=True)
        ]
        return self

    def copy_to(self, device: torch.device) -> Batch:
        """Copy the batch out, in the order of the current stream's work."""
        tokens, targets, documents = (
            None if part is None else part.to(device, non_blocking=True) for part in self._pinned
        )
        self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._copied.record(torch.cuda.current_stream(device))
        assert tokens is not None
        assert targets is not None
        return Batch(tokens, targets, documents)


def _pinned(part: Tensor, room: Tensor | None) -> Tensor:
    if room is None or room.shape != part.shape:
        room = torch.empty_like(part, pin_memory=True)
    return room.copy_(part)
