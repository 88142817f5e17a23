"""Parameter groups of equal values are stepped as one."""

from __future__ import annotations

import copy
from typing import Any

import problems
import pytest
from engine import assert_same_bits, moved_alike
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

import steepest
from steepest.errors import UserError

SHAPES = ((4, 3),) * 5 + ((5,),)


def grouped(
    name: str, params: list[nn.Parameter], lrs: list[float] | None = None
) -> steepest.Optimizer:
    """Return an optimizer with a group for each parameter."""
    rates = [0.01] * len(params) if lrs is None else lrs
    groups: list[dict[str, Any]] = [
        {"params": [p], "role": "hidden" if p.ndim > 1 else "vector", "lr": lr}
        for p, lr in zip(params, rates, strict=True)
    ]
    return steepest.create(name, groups, compile=False)


def stepped(optimizer: steepest.Optimizer, params: list[nn.Parameter], steps: range) -> None:
    for step, grads in enumerate(problems.stream(steps.stop, SHAPES)):
        if step in steps:
            problems.set_gradients(params, grads)
            optimizer.step()


@pytest.mark.parametrize("name", ["adamw", "muon", "adafactor", "prodigy"])
def test_groups_of_equal_values_are_one(name: str) -> None:
    whole, apart = problems.parameters(shapes=SHAPES), problems.parameters(shapes=SHAPES)
    groups = [{**group, "lr": 0.01} for group in problems.with_roles(whole)]
    one = steepest.create(name, groups, compile=False)
    many = grouped(name, apart)
    stepped(one, whole, range(5))
    stepped(many, apart, range(5))
    assert len(many._plans()) == len(one._plans()) <= 2
    assert_same_bits(apart, whole)


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("key", ["lr", "weight_decay"])
def test_groups_whose_values_part_go_on_apart(name: str, key: str) -> None:
    params = problems.parameters(shapes=SHAPES)
    optimizer = grouped(name, params)
    stepped(optimizer, params, range(3))
    alone = copy.deepcopy(params)
    single = [grouped(name, [p]) for p in alone]
    for each, p, q in zip(single, alone, params, strict=True):
        each.state[p] = copy.deepcopy(dict(optimizer.state[q]))
    plans = len(optimizer._plans())
    for first in (optimizer.param_groups[1], single[1].param_groups[0]):
        first[key] = 0.5
    for step, grads in enumerate(problems.stream(6, SHAPES)):
        if step >= 3:
            problems.set_gradients(params, grads)
            problems.set_gradients(alone, grads)
            for each in (optimizer, *single):
                each.step()
    assert len(optimizer._plans()) == plans + 1
    for a, b, p0 in zip(params, alone, problems.parameters(shapes=SHAPES), strict=True):
        moved_alike(a, b, p0)


def test_a_warm_up_from_zero_takes_no_rates_for_equal() -> None:
    params = problems.parameters(shapes=SHAPES)
    optimizer = grouped("adamw", params, [0.01 * (1 + i) for i in range(6)])
    scheduler = LambdaLR(optimizer, lambda step: step / 4)
    plans = []
    for step in range(4):
        stepped(optimizer, params, range(step, step + 1))
        plans.append(list(optimizer._plans()))
        scheduler.step()
    assert len(plans[0]) == 6
    assert all(plan is first for now in plans for plan, first in zip(now, plans[0], strict=True))


def test_a_schedule_makes_no_plan_anew() -> None:
    params = problems.parameters(shapes=SHAPES)
    optimizer = grouped("adamw", params)
    scheduler = LambdaLR(optimizer, problems.cosine)
    plans = list(optimizer._plans())
    for step in range(4):
        stepped(optimizer, params, range(step, step + 1))
        scheduler.step()
    assert all(now is plan for now, plan in zip(optimizer._plans(), plans, strict=True))


def test_what_decides_the_state_cannot_change_in_one_of_many_groups() -> None:
    params = problems.parameters(shapes=SHAPES)
    optimizer = steepest.create("sgd", [{"params": [p], "momentum": 0.9} for p in params])
    stepped(optimizer, params, range(2))
    optimizer.param_groups[3]["momentum"] = 0.0
    with pytest.raises(UserError, match=r"momentum.*0\.9.*0\.0"):
        stepped(optimizer, params, range(2, 3))


def test_saved_with_many_groups_it_continues_to_the_bit() -> None:
    whole, params = problems.parameters(shapes=SHAPES), problems.parameters(shapes=SHAPES)
    stepped(grouped("muon", whole), whole, range(6))
    first = grouped("muon", params)
    stepped(first, params, range(3))
    resumed = grouped("muon", params)
    resumed.load_state_dict(copy.deepcopy(first.state_dict()))
    stepped(resumed, params, range(3, 6))
    assert_same_bits(params, whole)
