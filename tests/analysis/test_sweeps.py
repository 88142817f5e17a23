from __future__ import annotations

import random

import pytest

from steepest.analysis import lr_curves


@pytest.fixture
def curve(make_run):
    def make(losses, seeds=(0,)):
        runs = [make_run("lion", x, seed, lr) for lr, x in losses.items() for seed in seeds]
        random.Random(0).shuffle(runs)
        return lr_curves(runs)["lion"]

    return make


def test_points_are_sorted_and_name_their_runs(curve):
    result = curve({0.1: None, 0.001: 3.5, 0.01: 3.0})
    assert [(p.lr, p.loss) for p in result.points] == [(0.001, 3.5), (0.01, 3.0), (0.1, None)]
    assert result.points[0].hash == "lion-0.001-0"


@pytest.mark.parametrize(
    ("losses", "best", "edge"),
    [
        ({0.001: 3.5, 0.01: 3.0, 0.1: 3.2}, 0.01, ""),
        ({0.001: 3.5, 0.01: 3.2, 0.1: 3.0}, 0.1, "high"),
        ({0.001: 3.0, 0.01: 3.2, 0.1: 3.4}, 0.001, "low"),
        ({0.001: 3.5, 0.01: 3.0, 0.1: None}, 0.01, ""),  # the cliff was reached
        ({0.01: 3.0, 0.1: None}, 0.01, "low"),
        ({0.001: None, 0.01: 3.0, 0.1: 3.1}, 0.01, ""),
        ({0.01: 3.0}, 0.01, "only"),
        ({0.001: None, 0.01: None}, None, ""),
        ({0.001: 3.0, 0.01: 3.0, 0.1: 3.0}, 0.001, "low"),
    ],
)
def test_best_and_edge(curve, losses, best, edge):
    result = curve(losses)
    assert (result.best_lr, result.at_edge) == (best, edge)


def test_a_learning_rate_of_which_a_seed_diverged_is_not_best(make_run):
    runs = [make_run("a", 3.0, s, 0.01) for s in (0, 1)]
    runs += [make_run("a", 2.0, 0, 0.1), make_run("a", None, 1, 0.1), make_run("a", 3.5, 0, 0.001)]
    assert lr_curves(runs)["a"].best_lr == 0.01


def test_optimizers_are_apart(make_run):
    curves = lr_curves([make_run("a", 3.0, lr=0.1), make_run("b", 3.0, lr=0.2)])
    assert {name: c.best_lr for name, c in curves.items()} == {"a": 0.1, "b": 0.2}
