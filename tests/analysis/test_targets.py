from __future__ import annotations

import numpy as np
import pytest

from steepest.analysis import Evaluation, mean_curve, seconds_to_reach, tokens_to_reach


def curve(*losses):
    return [Evaluation(i, 100 * i, loss, 2.0 * i) for i, loss in enumerate(losses)]


def test_crossing_of_a_falling_curve_is_numpys_interpolation():
    rng = np.random.default_rng(0)
    losses = np.sort(rng.uniform(2, 7, 12))[::-1]
    points = curve(*losses.tolist())
    for target in rng.uniform(losses[-1], losses[0], 50):
        expected = np.interp(-target, -losses, 100.0 * np.arange(12))
        assert tokens_to_reach(points, target) == pytest.approx(expected)
        assert seconds_to_reach(points, target) == pytest.approx(expected / 50)


def test_first_crossing_counts_where_a_curve_goes_up_again():
    assert tokens_to_reach(curve(5, 3, 4, 2), 3.5) == pytest.approx(75)


def test_brute_force_scan_finds_no_earlier_point():
    points = curve(6, 4.5, 4.7, 3.9, 4.1, 3.2)
    tokens = np.linspace(0, 500, 500_001)
    losses = np.interp(tokens, [e.tokens for e in points], [e.val_loss for e in points])
    for target in (4.6, 4.4, 4.0, 3.3):
        first = tokens[np.argmax(losses <= target)]
        assert tokens_to_reach(points, target) == pytest.approx(first, abs=0.01)


def test_reached_at_the_start_at_an_evaluation_and_never():
    points = curve(5, 4, 3)
    assert tokens_to_reach(points, 6) == 0
    assert tokens_to_reach(points, 4) == 100
    assert tokens_to_reach(points, 3) == 200
    assert tokens_to_reach(points, 2.9) is None
    assert tokens_to_reach([], 3) is None


def test_lower_targets_never_take_fewer_tokens():
    points = curve(6, 4.5, 4.7, 3.9, 4.1, 3.2)
    reached = [tokens_to_reach(points, target) for target in np.linspace(6, 3.2, 200)]
    assert reached == sorted(reached)


def test_mean_curve_averages_finished_seeds_at_shared_steps(make_run):
    runs = [
        make_run(loss=3.0, seed=0, curve=[(0, 7.0), (50, 4.0), (100, 3.0)]),
        make_run(loss=3.4, seed=1, curve=[(0, 7.0), (25, 5.5), (50, 4.4), (100, 3.4)]),
        make_run(loss=None, seed=2, curve=[(0, 7.0), (50, 90.0)]),
    ]
    assert [(e.step, e.tokens, e.lowest, e.highest) for e in mean_curve(runs)] == [
        (0, 0, 7.0, 7.0),
        (50, 500, 4.0, 4.4),
        (100, 1000, 3.0, 3.4),
    ]
    assert [e.val_loss for e in mean_curve(runs)] == pytest.approx([7.0, 4.2, 3.2])


def test_mean_curve_ends_with_the_result_evaluated_there_or_not(make_run):
    for evaluations in ([(0, 7.0), (50, 4.0)], [(0, 7.0), (50, 4.0), (100, 3.3)]):
        last = mean_curve([make_run(loss=3.0, curve=evaluations)])[-1]
        assert (last.step, last.tokens, last.val_loss) == (100, 1000, 3.0)


def test_no_finished_run_has_no_curve(make_run):
    assert mean_curve([make_run(loss=None)]) == ()
