from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from steepest.analysis import estimate, paired_difference
from steepest.errors import UserError


@pytest.fixture
def pair(make_run):
    rng = np.random.default_rng(0)
    shared = rng.normal(0, 0.1, 5)
    a, b = 3.0 + shared + rng.normal(0, 0.01, 5), 3.1 + shared + rng.normal(0, 0.01, 5)
    ours = [make_run("a", float(x), seed) for seed, x in enumerate(a)]
    theirs = [make_run("b", float(x), seed) for seed, x in enumerate(b)]
    return ours, theirs


def losses(runs):
    return [run.val_loss for run in runs]


def test_paired_difference_is_that_of_scipys_paired_t_test(pair):
    ours, theirs = pair
    difference = paired_difference(ours, theirs)
    interval = stats.ttest_rel(losses(ours), losses(theirs)).confidence_interval(0.95)
    assert difference.mean - difference.half_width == pytest.approx(interval.low)
    assert difference.mean + difference.half_width == pytest.approx(interval.high)
    assert difference.n == 5


def test_may_be_zero_agrees_with_the_p_value(make_run):
    rng = np.random.default_rng(1)
    seen = set()
    for _ in range(200):
        a, b = rng.normal(0, 1, 4), rng.normal(1, 1, 4)
        difference = paired_difference(
            [make_run("a", float(x), i) for i, x in enumerate(a)],
            [make_run("b", float(x), i) for i, x in enumerate(b)],
        )
        assert difference.may_be_zero == (stats.ttest_rel(a, b).pvalue >= 0.05)
        seen.add(difference.may_be_zero)
    assert seen == {True, False}


def test_interval_of_a_mean_is_scipys():
    values = [3.1, 3.4, 3.2]
    result = estimate(values)
    low, high = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
    assert (result.mean - result.half_width, result.mean + result.half_width) == pytest.approx(
        (low, high)
    )


def test_what_a_seed_adds_to_all_losses_cancels(pair, make_run):
    ours, theirs = pair
    added = [0.5, -2.0, 0.0, 7.0, 0.25]
    moved = [
        [make_run(run.optimizer, run.val_loss + added[run.seed], run.seed) for run in runs]
        for runs in pair
    ]
    before, after = paired_difference(ours, theirs), paired_difference(*moved)
    assert after.mean == pytest.approx(before.mean)
    assert after.half_width == pytest.approx(before.half_width)


def test_order_of_runs_does_not_matter_and_sides_are_antisymmetric(pair):
    ours, theirs = pair
    one = paired_difference(ours, theirs)
    assert paired_difference(ours[::-1], theirs[2:] + theirs[:2]) == one
    other = paired_difference(theirs, ours)
    assert (other.mean, other.half_width) == pytest.approx((-one.mean, one.half_width))


def test_only_shared_finished_seeds_are_paired(make_run):
    ours = [make_run("a", 3.0, 0), make_run("a", None, 1), make_run("a", 3.2, 2)]
    theirs = [make_run("b", 3.5, 0), make_run("b", 3.5, 1), make_run("b", 9.0, 3)]
    difference = paired_difference(ours, theirs)
    assert difference.mean == pytest.approx(-0.5)
    assert difference.n == 1


def test_one_seed_has_no_interval_and_can_not_exclude_zero(make_run):
    difference = paired_difference([make_run("a", 1.0)], [make_run("b", 9.0)])
    assert difference.half_width is None
    assert difference.may_be_zero


def test_no_shared_seed_has_no_difference(make_run):
    assert paired_difference([make_run("a", seed=1)], [make_run("b", seed=2)]) is None


def test_equal_losses_have_an_interval_of_no_width_that_contains_zero(make_run):
    runs = [make_run("a", 3.0, seed) for seed in range(3)]
    difference = paired_difference(runs, [make_run("b", 3.0, seed) for seed in range(3)])
    assert (difference.mean, difference.half_width) == (0, 0)
    assert difference.may_be_zero


def test_two_runs_of_one_seed_are_refused(make_run):
    with pytest.raises(UserError, match="seed 4"):
        paired_difference([make_run("a", seed=4), make_run("a", seed=4)], [make_run("b", seed=4)])


def test_nothing_has_no_estimate():
    with pytest.raises(ValueError, match="at least one"):
        estimate([])
