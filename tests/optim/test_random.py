"""Random numbers by key: reproducible anywhere, and as random as they should be."""

from __future__ import annotations

import numpy as np
import torch
from scipy import stats

from steepest.optim import random

KEY = random.new_key(0, 3)
SHAPE = (200, 500)


def test_the_same_in_any_batch_order_and_dtype() -> None:
    keys = torch.stack([random.new_key(0, i) for i in range(4)])
    together = torch.vmap(lambda key: random.normal(key, (3, 5)))(keys)
    for key, batch in zip(keys, together, strict=True):
        assert torch.equal(batch, random.normal(key, (3, 5)))
        wide = random.normal(key, (3, 5), torch.float64)
        torch.testing.assert_close(batch.double(), wide, rtol=1e-5, atol=1e-6)
    torch.manual_seed(1)
    assert torch.equal(together[0], random.normal(keys[0], (3, 5)))


def test_known_values_stay() -> None:
    # A checkpoint's next step depends on them.
    key = random.fold(random.new_key(7, 2), 10)
    assert random.bits(key, (3,)).tolist() == [641191353, 3615424348, 1416380382]


def test_distributions() -> None:
    uniform = random.uniform(KEY, SHAPE).numpy().ravel()
    assert uniform.min() >= 0
    assert uniform.max() < 1
    assert stats.kstest(uniform, "uniform").pvalue > 1e-3
    assert stats.kstest(random.normal(KEY, SHAPE).numpy().ravel(), "norm").pvalue > 1e-3
    sign = random.sign(KEY, SHAPE).numpy()
    assert set(np.unique(sign)) == {-1.0, 1.0}
    assert abs(sign.mean()) < 4 / sign.size**0.5


def test_bits_are_uniform() -> None:
    words = random.bits(KEY, (1 << 16,)).numpy()
    counts = np.array([((words >> bit) & 1).sum() for bit in range(32)])
    assert np.abs(counts - words.size / 2).max() < 5 * (words.size / 4) ** 0.5


def test_keys_steps_parameters_and_neighbours_are_uncorrelated() -> None:
    streams = [
        random.normal(random.fold(random.new_key(s, i), t), (20_000,))
        for s in range(3)
        for i in range(3)
        for t in range(3)
    ]
    matrix = torch.corrcoef(torch.stack(streams)) - torch.eye(len(streams))
    assert matrix.abs().max() < 5 / 20_000**0.5
    x = random.normal(KEY, (100_000,))
    for lag in (1, 2, 500, 512, 4096):
        assert torch.corrcoef(torch.stack([x[:-lag], x[lag:]]))[0, 1].abs() < 5 / 100_000**0.5
