"""What a race consists of."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

import steepest
from steepest import models
from steepest.errors import UserError
from steepest.study import plan as planning
from steepest.study.plan import TUNING_SEED, RacePlan


def make_plan(*names: str, seeds: int = 3, tokens: int = 4096) -> RacePlan:
    base = planning.base_config(
        model="race",
        corpus="sotu",
        vocab_size=None,
        tokens=tokens,
        batch_size=4,
        sequence_length=64,
        schedule="linear",
        precision="float32",
        compile=False,
    )
    evaluation = replace(base.evaluation, tokens=512)  # evaluations would be most of the time
    entrants = tuple(planning.entrant(name, ()) for name in names)
    return RacePlan(entrants, replace(base, evaluation=evaluation), seeds, names[0], "race")


def test_runs_differ_only_in_optimizer_and_seed() -> None:
    plan = make_plan("adamw", "muon")
    for entrant in plan.entrants:
        for config in plan.tuning(entrant) + plan.final(entrant, 0.01):
            plain = {key: value for key, value in config.to_dict().items() if key != "optimizer"}
            plain["training"] = {k: v for k, v in plain["training"].items() if k != "seed"}
            base = {key: value for key, value in plan.base.to_dict().items() if key != "optimizer"}
            base["training"] = {k: v for k, v in base["training"].items() if k != "seed"}
            assert plain == base


def test_final_seeds_are_fresh_and_the_same_for_all() -> None:
    plan = make_plan("adamw", "lion", seeds=4)
    seeds = [
        [config.training.seed for config in plan.final(entrant, 0.01)] for entrant in plan.entrants
    ]
    assert seeds[0] == seeds[1]
    assert len(set(seeds[0])) == 4
    assert TUNING_SEED not in seeds[0]


def test_number_of_runs() -> None:
    plan = make_plan("adamw", "sgd", seeds=2)
    expected = sum(len(plan.tuning(e)) + len(plan.final(e, e.lrs[0])) for e in plan.entrants)
    assert plan.runs == expected


@pytest.mark.parametrize(("tokens", "steps"), [(256 * 8, 8), (256 * 8 + 1, 9), (1, 2)])
def test_tokens_are_rounded_up_to_steps(tokens: int, steps: int) -> None:
    assert make_plan("adamw", tokens=tokens).base.training.steps == steps


def test_default_race_is_what_the_documents_say() -> None:
    protocol = planning.defaults()["protocol"]
    names = protocol["optimizers"]
    assert set(names) >= {"sgd", "signum", "lion", "adamw", "adafactor", "muon", "soap"}
    assert protocol["baseline"] in names
    assert protocol["seeds"] >= 3
    for name in names:
        grid = planning.entrant(name, ()).lrs
        assert len(grid) >= 3
        ratios = [b / a for a, b in itertools.pairwise(grid)]
        assert max(ratios) < 1.2 * min(ratios), f"the grid of {name} is not logarithmic"


def test_learning_rates_for_all_and_for_one() -> None:
    names = ("adamw", "mine.py:Mine")
    assert planning.grids(("1e-3", "1e-2"), names) == dict.fromkeys(names, (1e-3, 1e-2))
    given = planning.grids(("1e-3", "mine.py:Mine=0.1,0.2"), names)
    assert given == {"adamw": (1e-3,), "mine.py:Mine": (0.1, 0.2)}
    assert planning.grids((), names) == dict.fromkeys(names, ())


@pytest.mark.parametrize("item", ["fast", "-1", "0", "nan", "inf", "lion=1e-3", "adamw=1e-3,x"])
def test_wrong_learning_rates(item: str) -> None:
    with pytest.raises(UserError, match="--lrs"):
        planning.grids((item,), ("adamw",))


def test_unknown_optimizer_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'muon'"):
        planning.entrant("muno", ())


def test_key_changes_with_the_protocol_only() -> None:
    plan = make_plan("adamw")
    assert plan.key() == make_plan("lion", "muon").key()
    assert plan.key() != make_plan("adamw", tokens=8192).key()
    assert plan.key() == make_plan("adamw", seeds=2).key()


def test_protocol_covers_everything_that_runs_share() -> None:
    plan = make_plan("adamw")
    for section, changed in {
        "schedule": {"warmup_shape": "half_cosine"},
        "data": {"fingerprint": "of other texts"},
        "evaluation": {"every": 1},
        "model": {"init_std": 0.1},
    }.items():
        part = replace(getattr(plan.base, section), **changed)
        other = replace(plan, base=replace(plan.base, **{section: part}))
        assert other.key() != plan.key(), section


def test_soap_rotates_both_sides_of_every_hidden_matrix_of_the_default_race() -> None:
    protocol = planning.defaults()["protocol"]
    model = models.Llama(models.size(protocol["model"]))
    options = planning.entrant("soap", ()).options
    optimizer = steepest.create("soap", model, **options)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    roles = steepest.roles(model)
    for name, p in model.named_parameters():
        if roles[name].role is steepest.Role.HIDDEN:
            assert {"factor_left", "factor_right"} <= set(optimizer.state[p]), name
