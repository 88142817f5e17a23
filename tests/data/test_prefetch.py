"""Prefetching: the same batches in the same order, bounded, with errors and endings passed on."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from made_up import split_of

from steepest.data import Batch, Loader, Packing
from steepest.data.prefetch import DEPTH, Prefetcher
from steepest.errors import UserError

CPU = torch.device("cpu")
LOADER = Loader(split_of([30, 7, 90, 12] * 20), 4, 16, 0, Packing("documents"))


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def settled(condition: object) -> None:
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.002)
    assert condition()


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    settled(lambda: not threads())


def test_batches_are_those_of_the_loader_in_order() -> None:
    with Prefetcher(LOADER.rows, range(5, 60), CPU) as batches:
        for step, batch in enumerate(batches, 5):
            expected = LOADER.rows(step)
            assert torch.equal(batch.tokens, expected.tokens)
            assert torch.equal(batch.targets, expected.targets)
            assert torch.equal(batch.documents, expected.documents)
    assert step == 59


def test_no_more_batches_are_made_than_have_room() -> None:
    made = []

    def make(step: int) -> Batch:
        made.append(step)
        return LOADER.rows(step)

    with Prefetcher(make, itertools.count(), CPU) as batches:
        for taken in range(1, 5):
            next(batches)
            settled(lambda: len(made) >= taken + DEPTH)  # noqa: B023
            time.sleep(0.02)
            assert made == list(range(taken + DEPTH))


def test_batches_are_kept_apart() -> None:
    with Prefetcher(LOADER.rows, range(20), CPU) as batches:
        kept = list(batches)
    for step, batch in enumerate(kept):
        assert torch.equal(batch.tokens, LOADER.rows(step).tokens)


def test_an_error_comes_where_its_batch_would_have() -> None:
    def make(step: int) -> Batch:
        if step == 7:
            raise UserError("The disk was unplugged.")
        return LOADER.rows(step)

    with Prefetcher(make, range(20), CPU) as batches:
        for _ in range(7):
            next(batches)
        with pytest.raises(UserError, match="unplugged"):
            next(batches)
        with pytest.raises(StopIteration):
            next(batches)


@pytest.mark.parametrize("taken", [0, 1, 5])
def test_it_ends_when_its_consumer_does(taken: int) -> None:
    def consume() -> None:
        with Prefetcher(LOADER.rows, itertools.count(), CPU) as batches:
            seen.append(batches)
            for _ in range(taken):
                next(batches)
            raise KeyError

    seen: list[Prefetcher] = []
    with pytest.raises(KeyError):
        consume()
    assert not threads()
    assert list(seen[0]) == []


def test_closing_twice_and_after_the_end() -> None:
    batches = Prefetcher(LOADER.rows, range(2), CPU)
    assert len(list(batches)) == 2
    batches.close()
    batches.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_pinned_buffers_are_not_overwritten_before_they_are_copied() -> None:
    device = torch.device("cuda")
    split = split_of([40_000] * 30)
    loader = Loader(split, 256, 1024, 0, Packing("documents"))
    busy = torch.randn(8192, 8192, device=device)
    with Prefetcher(loader.rows, range(3 * DEPTH), device) as batches:
        kept = []
        for batch in batches:
            busy = (busy @ busy).clamp(-1, 1)  # the host runs far ahead of the copies
            kept.append(batch)
    for step, batch in enumerate(kept):
        expected = loader.rows(step)
        assert torch.equal(batch.tokens.cpu(), expected.tokens)
        assert torch.equal(batch.documents.cpu(), expected.documents)
    assert np.isfinite(busy.sum().item())
