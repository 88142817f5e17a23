"""Training order: purity, coverage of every epoch, any share of any step; validation: coverage."""

from __future__ import annotations

import dataclasses
import time
import tracemalloc

import numpy as np
import pytest
import torch
from made_up import split_of

from steepest.data import Batch, Loader, Packing, TokenSplit, order, validation_batches
from steepest.data.splits import ShardedArray
from steepest.errors import UserError

LENGTH = 10
BATCH = 7


def stream(tokens: np.ndarray) -> TokenSplit:
    return TokenSplit(ShardedArray([tokens]), ShardedArray([np.array([len(tokens)])]), len(tokens))


SPLIT = stream(np.arange(1003, dtype=np.uint16))  # every token is its own position
LOADER = Loader(SPLIT, BATCH, LENGTH, seed=0)
WINDOWS = LOADER.rows_per_epoch


def starts(seed: int, steps: range) -> np.ndarray:
    """The first tokens of the rows of consecutive steps."""
    loader = dataclasses.replace(LOADER, seed=seed)
    return np.concatenate([loader.rows(step).tokens[:, 0].numpy() for step in steps])


def test_targets_are_tokens_shifted_by_one() -> None:
    batch = LOADER.rows(4)
    assert batch.tokens.shape == batch.targets.shape == (BATCH, LENGTH)
    assert batch.tokens.dtype == batch.targets.dtype == torch.int64
    assert torch.equal(batch.targets, batch.tokens + 1)
    assert (batch.tokens.diff(dim=1) == 1).all()


def test_every_window_is_seen_exactly_once_per_epoch() -> None:
    seen = starts(0, range(3 * WINDOWS // BATCH))
    for epoch in range(2):
        own = np.sort(seen[epoch * WINDOWS : (epoch + 1) * WINDOWS])
        assert len(np.unique(own)) == WINDOWS
        assert set(np.diff(own)) == {LENGTH}  # they tile: no overlap, no gap
        assert not np.array_equal(own, seen[epoch * WINDOWS : (epoch + 1) * WINDOWS])


def test_windows_differ_between_epochs() -> None:
    seen = starts(0, range(4 * WINDOWS // BATCH))
    assert len({int(seen[epoch * WINDOWS]) % LENGTH for epoch in range(3)}) > 1
    assert len({tuple(seen[epoch * WINDOWS :][:5] // LENGTH) for epoch in range(3)}) == 3


def test_every_offset_leaves_room_for_the_last_target() -> None:
    # The shortest data with this many windows: an offset too far would run off the end.
    split = stream(np.arange((BATCH + 1) * LENGTH, dtype=np.uint16))
    loader = Loader(split, BATCH, LENGTH, seed=1)
    assert loader.rows_per_epoch == BATCH
    assert max(int(loader.rows(step).targets.max()) for step in range(60)) < len(split)


def test_a_batch_is_a_pure_function_of_its_arguments() -> None:
    alone = LOADER.rows(40)
    starts(5, range(3))
    for step in range(10):
        LOADER.rows(step).tokens.zero_()  # a caller may write into its batch
    assert torch.equal(alone.tokens, LOADER.rows(40).tokens)


def test_seeds_and_steps_differ() -> None:
    batches = [starts(seed, range(step, step + 1)) for seed in range(3) for step in range(3)]
    assert len({array.tobytes() for array in batches}) == len(batches)


def test_the_order_is_pinned() -> None:
    # Recorded runs depend on it: a change here invalidates every published result.
    assert starts(0, range(1)).tolist() == [717, 307, 77, 507, 187, 257, 87]


def test_the_order_of_large_epochs_is_pinned() -> None:
    units = order.epoch_order(0, 0, 10**9).units(np.arange(4))
    assert units.tolist() == [228781304, 47032596, 477281009, 410658023]


def joined(batches: list[Batch]) -> list[torch.Tensor]:
    fields = [[batch.tokens, batch.targets, batch.documents] for batch in batches]
    return [torch.cat(parts) for parts in zip(*fields, strict=True) if parts[0] is not None]


@pytest.mark.parametrize("mode", ["contiguous", "documents", "rows"])
@pytest.mark.parametrize(("processes", "microbatches"), [(1, 1), (2, 1), (1, 3), (4, 3), (12, 1)])
def test_shares_make_up_the_batch(mode: str, processes: int, microbatches: int) -> None:
    split = split_of([5, 1, 17, 3, 40, 8, 2, 30, 12, 9, 9, 25, 4, 61], parts=(50, 100))
    loader = Loader(split, 12, 8, seed=3, packing=Packing(mode))
    share = 12 // processes // microbatches
    for step in range(5):  # some of them cross from one epoch to the next
        parts = [
            loader.rows(step, (rank * microbatches + micro) * share, share)
            for rank in range(processes)
            for micro in range(microbatches)
        ]
        for whole, together in zip(joined([loader.rows(step)]), joined(parts), strict=True):
            assert torch.equal(whole, together)


def test_rows_of_documents_are_each_seen_once_per_epoch() -> None:
    split = split_of([4] * 10)
    loader = Loader(split, 5, 6, seed=0, packing=Packing("rows"))
    for epoch in range(3):
        seen = [loader.rows(2 * epoch + half).tokens[:, 0] for half in range(2)]
        assert sorted(torch.cat(seen).tolist()) == list(range(1000, 1040, 4))


@pytest.mark.parametrize("size", [2**20 + 1, 2**21, 3_000_017])
def test_a_large_epoch_is_a_permutation(size: int) -> None:
    units = order.epoch_order(7, 2, size).units(np.arange(size))
    assert np.array_equal(np.sort(units), np.arange(size))


def test_small_permutations_of_the_same_kind_are_permutations() -> None:
    keys = np.random.Philox(1).random_raw(order.ROUNDS)
    for size in (1, 2, 3, 5, 17, 64, 1000):
        units = order._permuted(np.arange(size), size, keys)
        assert np.array_equal(np.sort(units), np.arange(size))


def test_a_large_epoch_is_well_mixed() -> None:
    size = 2**21 + 12_345
    first = order.epoch_order(0, 0, size).units(np.arange(size))
    other = order.epoch_order(0, 1, size).units(np.arange(size))
    places = np.arange(size)
    # Correlations of n values are 1/sqrt(n) for chance, 0.0007 here.
    for lag in (1, 2, 1024, 4096):
        assert abs(np.corrcoef(first[:-lag], first[lag:])[0, 1]) < 0.004
    assert abs(np.corrcoef(first, places)[0, 1]) < 0.004
    assert abs(np.corrcoef(first, other)[0, 1]) < 0.004
    assert int((first == places).sum()) < 10  # about 1 by chance
    assert int((np.diff(first) == 1).sum()) < 10
    # Every stretch of the order takes evenly from every part of the data: chi-squared of 32 x 32.
    table, _, _ = np.histogram2d(places, first, bins=32)
    expected = size / 1024
    assert 900 < ((table - expected) ** 2 / expected).sum() < 1150  # 1023 +- 45 by chance
    # So does each residue, which a weak round function would leave in step.
    table, _, _ = np.histogram2d(places % 32, first % 32, bins=32)
    assert 800 < ((table - expected) ** 2 / expected).sum() < 1150


def test_sorted_and_computed_orders_meet_at_the_limit() -> None:
    small = order.epoch_order(0, 0, order.SORTED_UP_TO)
    large = order.epoch_order(0, 0, order.SORTED_UP_TO + 1)
    assert small.order is not None
    assert large.order is None
    assert small.draw == large.draw


class Endless(ShardedArray):
    """2^40 tokens, each its position modulo 65536, in no memory."""

    def __init__(self) -> None:
        super().__init__([np.empty(0, np.uint16)])

    def __len__(self) -> int:
        return 2**40

    def windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        return ((starts[:, None] + np.arange(length)) % 2**16).astype(np.uint16)


def test_a_late_step_of_a_huge_corpus_costs_nothing() -> None:
    loader = Loader(TokenSplit(Endless(), ShardedArray([np.array([2**40])]), 2**42), 512, 256, 0)
    loader.rows(0)
    order.epoch_order.cache_clear()
    tracemalloc.start()
    began = time.perf_counter()
    batch = loader.rows(10**6)  # the middle of the first epoch
    late = loader.rows(10**12)  # epochs later
    seconds = time.perf_counter() - began
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert batch.tokens.shape == late.tokens.shape == (512, 256)
    assert seconds < 0.5  # 10 ms on an idle machine
    assert peak < 20e6  # the batches themselves are 2 MB


def test_a_batch_is_cheap() -> None:
    loader = Loader(stream(np.zeros(2_000_000, dtype=np.uint16)), 16, 128, seed=0)
    times = []
    for step in range(200):
        start = time.perf_counter()
        loader.rows(step)
        times.append(time.perf_counter() - start)
    assert np.median(times) < 1e-3  # 0.1 ms on an idle machine


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"batch_size": 1000}, "make 99 sequences of 10, but a batch needs 1000"),
        ({"sequence_length": 2000}, "make 0 sequences"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"sequence_length": 0}, "sequence_length must be at least 1"),
        ({"seed": -1}, "must not be negative"),
        ({"packing": Packing("rows")}, "make 1 sequences of 10, but a batch needs 7"),
    ],
)
def test_impossible_batches_are_refused(arguments: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        dataclasses.replace(LOADER, **arguments)


@pytest.mark.parametrize("rows", [(-1,), (0, -1), (0, 0, 0), (0, 3, 5), (0, 7)])
def test_rows_that_do_not_exist_are_refused(rows: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=r"has no rows .* the rows of a batch are 0 to 6"):
        LOADER.rows(*rows)


def test_validation_covers_the_tokens_once_in_order() -> None:
    batches = list(validation_batches(SPLIT, batch_size=8, sequence_length=LENGTH, max_tokens=None))
    assert [len(batch.tokens) for batch in batches] == [8] * 12 + [4]
    assert torch.equal(torch.cat([b.tokens for b in batches]).flatten(), torch.arange(1000))
    assert torch.equal(torch.cat([b.targets for b in batches]).flatten(), torch.arange(1, 1001))


@pytest.mark.parametrize("world_size", [1, 2, 5, 20])
def test_processes_share_validation(world_size: int) -> None:
    arguments = {"batch_size": 8, "sequence_length": LENGTH, "max_tokens": None}
    seen = [
        start
        for rank in range(world_size)
        for batch in validation_batches(SPLIT, rank=rank, world_size=world_size, **arguments)
        for start in batch.tokens[:, 0].tolist()
    ]
    assert sorted(seen) == list(range(0, 1000, 10))


def test_a_short_validation_is_spread_over_the_tokens() -> None:
    batches = validation_batches(SPLIT, batch_size=2, sequence_length=LENGTH, max_tokens=59)
    assert torch.cat([b.tokens[:, 0] for b in batches]).tolist() == [0, 200, 400, 600, 800]


def test_validation_of_documents_and_rows() -> None:
    split = split_of([4] * 10)
    arguments = {"batch_size": 3, "sequence_length": 6}
    packing = Packing("documents")
    batches = list(validation_batches(split, max_tokens=None, packing=packing, **arguments))
    assert all(batch.documents is not None for batch in batches)
    assert sum(len(batch.tokens) for batch in batches) == 6
    packing = Packing("rows")
    batches = list(validation_batches(split, max_tokens=32, packing=packing, **arguments))
    starts = torch.cat([batch.tokens[:, 0] for batch in batches])
    assert starts.tolist() == [1000, 1008, 1016, 1024, 1032]


def test_validation_without_a_row_is_refused_at_once() -> None:
    arguments = {"batch_size": 1, "sequence_length": 10}
    with pytest.raises(UserError, match="too few for one sequence"):
        validation_batches(stream(np.arange(10)), max_tokens=None, **arguments)
    with pytest.raises(UserError, match="at least 10"):
        validation_batches(SPLIT, max_tokens=9, **arguments)
    with pytest.raises(UserError, match="rank must be from 0 to 1, not 2"):
        validation_batches(SPLIT, max_tokens=None, rank=2, world_size=2, **arguments)
