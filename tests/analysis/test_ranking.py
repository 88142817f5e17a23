from __future__ import annotations

import math
import random

import numpy as np
import pytest
from scipy import stats

from steepest.analysis import leaderboard


@pytest.fixture
def finals(make_run):
    """Final runs from {optimizer: losses by seed}."""

    def make(**losses):
        return [
            make_run(name, loss, seed)
            for name, values in losses.items()
            for seed, loss in enumerate(values)
        ]

    return make


def ranks(runs, baseline="adamw"):
    return {row.optimizer: row.rank_label for row in leaderboard(runs, [], baseline)}


SEEDS = np.array([0.3, -0.1, 0.2])


def test_order_ranks_and_ties(finals):
    noise = np.array([0.01, -0.02, 0.012])
    runs = finals(
        adamw=3.4 + SEEDS,
        soap=3.3 + SEEDS,
        muon=3.302 + SEEDS + noise,
        lion=3.5 + SEEDS + noise / 10,
    )
    assert ranks(runs) == {"soap": "1=", "muon": "1=", "adamw": "3", "lion": "4"}


def test_a_group_is_told_from_the_next_by_its_leader(finals):
    """c can't be told from b, but b joined a's group, and c is told from a."""
    wide = np.array([0.2, -0.2, 0.0])
    runs = finals(a=3.0 + SEEDS, b=3.02 + SEEDS + wide, c=3.05 + SEEDS + 0.001 * wide)
    assert ranks(runs, "a") == {"a": "1=", "b": "1=", "c": "3"}


def test_rule_against_a_brute_force(finals):
    rng = np.random.default_rng(3)
    for _ in range(30):
        losses = {f"o{i}": rng.normal(3 + 0.02 * i, 0.03, 4) for i in range(6)}
        order = sorted(losses, key=lambda name: losses[name].mean())
        expected, leader = {}, None
        for place, name in enumerate(order, start=1):
            apart = leader and stats.ttest_rel(losses[name], losses[leader]).pvalue < 0.05
            if leader is None or apart:
                leader, rank = name, place
            expected[name] = rank
        found = {r.optimizer: r.rank for r in leaderboard(finals(**losses), [], "o0")}
        assert found == expected


def test_order_of_runs_and_names_of_tied_optimizers_do_not_matter(finals):
    rng = np.random.default_rng(4)
    losses = {name: rng.normal(3, 0.05, 3) for name in ("a", "b", "c")}
    runs = finals(**losses)
    rows = leaderboard(runs, [], "a")
    random.Random(0).shuffle(runs)
    assert leaderboard(runs, [], "a") == rows
    swapped = finals(a=losses["b"], b=losses["a"], c=losses["c"])
    renamed = {"a": "b", "b": "a", "c": "c"}
    before = ranks(finals(**losses), "c")
    assert ranks(swapped, "c") == {renamed[n]: label for n, label in before.items()}


def test_equal_losses_are_tied_and_a_constant_gap_is_not(finals):
    assert ranks(finals(adamw=[3.0] * 3, lion=[3.0] * 3)) == {"adamw": "1=", "lion": "1="}
    assert ranks(finals(adamw=[3.0] * 3, lion=[3.5] * 3)) == {"adamw": "1", "lion": "2"}


def test_one_seed_tells_nothing_apart(finals):
    rows = leaderboard(finals(adamw=[3.4], muon=[3.0]), [], "adamw")
    assert [(r.optimizer, r.rank_label) for r in rows] == [("muon", "1="), ("adamw", "1=")]
    assert rows[0].difference.mean == pytest.approx(-0.4)
    assert rows[0].difference.half_width is None
    assert rows[0].val_loss.half_width is None


def test_diverged_runs_rank_below_and_all_diverged_last(finals):
    runs = finals(
        adamw=[3.4, 3.5, 3.45],
        fast=[2.0, None, 2.1],
        lost=[None, None, None],
        gone=[None, None, None],
    )
    rows = leaderboard(runs, [], "adamw")
    labels = [(row.optimizer, row.rank_label, row.diverged) for row in rows]
    assert labels == [("adamw", "1", 0), ("fast", "2", 1), ("gone", "3=", 3), ("lost", "3=", 3)]
    assert rows[1].val_loss.mean == pytest.approx(2.05)
    assert rows[1].difference.n == 2
    assert rows[2].val_loss is None
    assert rows[2].perplexity is None
    assert rows[2].state_bytes == 400


def test_baseline_has_a_row_without_runs_too(finals):
    rows = leaderboard(finals(muon=[3.0, 3.1]), [], "adamw")
    assert [(row.optimizer, row.rank_label, row.is_baseline) for row in rows] == [
        ("muon", "1", False),
        ("adamw", "–", True),
    ]
    assert rows[0].difference is None
    assert rows[0].tokens_to_baseline is None


def test_numbers_of_a_row(make_run):
    baseline = [(0, 7.0), (50, 5.0), (100, 4.0)]
    quick = [(0, 7.0), (50, 3.0), (100, 2.0)]
    runs = [make_run("adamw", 4.0, s, curve=baseline) for s in (0, 1)]
    runs += [make_run("muon", 2.0, s, 0.02, curve=quick, step_ms=8.0 + s) for s in (0, 1)]
    tuning = [make_run("muon", 2.0 + lr, 9, lr) for lr in (0.02, 0.06)]
    muon, adamw = leaderboard(runs, tuning, "adamw")
    assert muon.perplexity == pytest.approx(math.exp(2))
    assert (muon.best_lr, muon.lr_at_edge, adamw.lr_at_edge) == (0.02, "low", "")
    assert muon.tokens_to_baseline == pytest.approx(375)  # 3/4 of the way from 7 to 3
    assert muon.token_speedup == pytest.approx(1000 / 375)
    assert muon.seconds_to_baseline == pytest.approx(0.375)
    assert (muon.step_ms, muon.state_bytes_per_parameter) == (8.5, 8)
    assert muon.hashes == ("muon-0.02-0", "muon-0.02-1")
    assert (adamw.tokens_to_baseline, adamw.token_speedup, adamw.time_speedup) == (1000, 1, 1)


def test_baseline_is_no_speedup_over_itself_whatever_its_curve(make_run):
    """It dips below its final loss on the way, and its seeds end at different losses."""
    rng = np.random.default_rng(5)
    for _ in range(20):
        runs = [
            make_run("adamw", float(x), s, curve=[(0, 7.0), (40, 3.0), (60, 5.0), (80, 4.4)])
            for s, x in enumerate(rng.normal(4, 0.2, 7))
        ]
        (row,) = leaderboard(runs[::-1], [], "adamw")
        assert row.token_speedup == 1
        assert row.time_speedup == 1
