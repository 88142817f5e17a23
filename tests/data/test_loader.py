"""Batches: purity, coverage of every epoch, shifted targets; validation: order and coverage."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from steepest.data import batch, validation_batches
from steepest.data.loader import windows_per_epoch
from steepest.errors import UserError

TOKENS = np.arange(1003, dtype=np.uint16)  # every token is its own position
LENGTH = 10
BATCH = 7
WINDOWS = windows_per_epoch(TOKENS, LENGTH)


def rows(seed: int, steps: range) -> np.ndarray:
    """The input windows of consecutive steps, one per row."""
    return np.concatenate(
        [
            batch(TOKENS, seed=seed, step=step, batch_size=BATCH, sequence_length=LENGTH)[0].numpy()
            for step in steps
        ]
    )


def test_targets_are_inputs_shifted_by_one() -> None:
    inputs, targets = batch(TOKENS, seed=3, step=4, batch_size=BATCH, sequence_length=LENGTH)
    assert inputs.shape == targets.shape == (BATCH, LENGTH)
    assert inputs.dtype == targets.dtype == torch.int64
    assert torch.equal(targets, inputs + 1)
    assert (inputs.diff(dim=1) == 1).all()


def test_every_window_is_seen_exactly_once_per_epoch() -> None:
    seen = rows(0, range(3 * WINDOWS // BATCH))
    for epoch in range(2):
        starts = np.sort(seen[epoch * WINDOWS : (epoch + 1) * WINDOWS, 0])
        assert len(np.unique(starts)) == WINDOWS
        assert set(np.diff(starts)) == {LENGTH}  # they tile: no overlap, no gap
        assert not np.array_equal(starts, seen[epoch * WINDOWS : (epoch + 1) * WINDOWS, 0])


def test_windows_differ_between_epochs() -> None:
    seen = rows(0, range(4 * WINDOWS // BATCH))
    offsets = {int(seen[epoch * WINDOWS, 0]) % LENGTH for epoch in range(3)}
    orders = {tuple(seen[epoch * WINDOWS :][:5, 0] // LENGTH) for epoch in range(3)}
    assert len(offsets) > 1
    assert len(orders) == 3


def test_every_offset_leaves_room_for_the_last_target() -> None:
    # The shortest data with this many windows: an offset too far would run off the end.
    tokens = np.arange((BATCH + 1) * LENGTH, dtype=np.uint16)
    for step in range(60):
        _, targets = batch(tokens, seed=1, step=step, batch_size=BATCH, sequence_length=LENGTH)
        assert targets.max() < len(tokens)
    assert windows_per_epoch(tokens, LENGTH) == BATCH


def test_a_batch_is_a_pure_function_of_its_arguments() -> None:
    alone = rows(5, range(40, 41))
    rows(5, range(3))
    rows(6, range(40, 60))
    other = np.arange(5000, dtype=np.uint32)
    for step in range(10):
        inputs, _ = batch(other, seed=5, step=step, batch_size=BATCH, sequence_length=LENGTH)
        inputs.zero_()  # a caller may write into its batch
    again = rows(5, range(40, 41))
    assert np.array_equal(alone, again)


def test_seeds_and_steps_differ() -> None:
    batches = [rows(seed, range(step, step + 1)) for seed in range(3) for step in range(3)]
    assert len({array.tobytes() for array in batches}) == len(batches)


def test_the_order_is_pinned() -> None:
    # Recorded runs depend on it: a change here invalidates every published result.
    assert rows(0, range(1))[:, 0].tolist() == [717, 307, 77, 507, 187, 257, 87]


def test_a_batch_is_cheap() -> None:
    tokens = np.zeros(2_000_000, dtype=np.uint16)
    times = []
    for step in range(200):
        start = time.perf_counter()
        batch(tokens, seed=0, step=step, batch_size=16, sequence_length=128)
        times.append(time.perf_counter() - start)
    assert np.median(times) < 1e-3  # 0.02 ms on an idle machine


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"batch_size": 1000}, "make 99 sequences of 10, but a batch needs 1000"),
        ({"sequence_length": 2000}, "make 0 sequences"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"sequence_length": 0}, "sequence_length must be at least 1"),
        ({"seed": -1}, "must not be negative"),
        ({"step": -1}, "must not be negative"),
    ],
)
def test_impossible_batches_are_refused(arguments: dict[str, int], words: str) -> None:
    usual = {"seed": 0, "step": 0, "batch_size": BATCH, "sequence_length": LENGTH}
    with pytest.raises(UserError, match=words):
        batch(TOKENS, **(usual | arguments))


def test_validation_covers_the_tokens_once_in_order() -> None:
    batches = list(
        validation_batches(TOKENS, batch_size=8, sequence_length=LENGTH, max_tokens=None)
    )
    assert [len(inputs) for inputs, _ in batches] == [8] * 12 + [4]
    inputs = torch.cat([inputs for inputs, _ in batches]).flatten()
    targets = torch.cat([targets for _, targets in batches]).flatten()
    assert torch.equal(inputs, torch.arange(1000))
    assert torch.equal(targets, torch.arange(1, 1001))


def test_a_short_validation_is_spread_over_the_tokens() -> None:
    batches = list(validation_batches(TOKENS, batch_size=2, sequence_length=LENGTH, max_tokens=59))
    starts = torch.cat([inputs[:, 0] for inputs, _ in batches])
    assert len(starts) == 5
    assert starts.tolist() == [0, 200, 400, 600, 800]


def test_validation_without_a_window_is_refused_at_once() -> None:
    with pytest.raises(UserError, match="too few for one sequence"):
        validation_batches(TOKENS[:10], batch_size=1, sequence_length=10, max_tokens=None)
    with pytest.raises(UserError, match="at least 10"):
        validation_batches(TOKENS, batch_size=1, sequence_length=10, max_tokens=9)
