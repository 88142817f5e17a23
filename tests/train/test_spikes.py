"""What counts as a loss spike."""

from __future__ import annotations

import math
import random

import pytest

from steepest.train.spikes import SpikeCounter


def counted(losses: list[float]) -> int:
    counter = SpikeCounter()
    for loss in losses:
        counter.update(loss)
    return counter.count


def noisy(steps: int, sigma: float = 0.05) -> list[float]:
    rng = random.Random(0)
    return [3 + 4 * math.exp(-step / 50) + rng.gauss(0, sigma) for step in range(steps)]


def test_a_run_without_spikes_has_none() -> None:
    assert counted(noisy(2000)) == 0
    assert counted([3 + 0.001 * (step % 2) + 0.05 * (step == 60) for step in range(100)]) == 0


@pytest.mark.parametrize(("rise", "spikes"), [(0.05, 0), (0.15, 0), (1.0, 1), (math.nan, 1)])
def test_a_spike_rises_above_the_noise(rise: float, spikes: int) -> None:
    losses = noisy(600)
    losses[500] += rise
    assert counted(losses) == spikes


def test_losses_in_a_row_are_one_spike_and_a_new_level_none() -> None:
    losses = noisy(600)
    losses[400:410] = [8.0] * 10
    losses[450] = losses[452] = 8.0
    assert counted(losses) == 3
    risen = noisy(400) + [x + 2 for x in noisy(2000)[400:]]
    assert counted(risen) == 1
    assert counted([3.0] * 19 + [9.0]) == 0  # too early to tell


def test_the_definition() -> None:
    """Median 3, median absolute deviation 0.1: the limit is 3 + 4 * 1.4826 * 0.1."""
    before = [3 + 0.01 * (number - 20) for number in range(41)]
    random.Random(0).shuffle(before)
    limit = 3 + 4 * 1.4826 * 0.1
    assert counted([*before, limit - 1e-6]) == 0
    assert counted([*before, limit + 1e-6]) == 1


def test_a_resumed_counter_goes_on() -> None:
    losses = noisy(300)
    losses[200] = losses[201] = 9.0
    whole, first, second = SpikeCounter(), SpikeCounter(), SpikeCounter()
    for loss in losses:
        whole.update(loss)
    for loss in losses[:201]:
        first.update(loss)
    second.load_state_dict(first.state_dict())
    for loss in losses[201:]:
        second.update(loss)
    assert whole.count == 1
    assert second.state_dict() == whole.state_dict()
