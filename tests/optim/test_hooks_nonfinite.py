"""Gradients that are not finite."""

from __future__ import annotations

import copy
import io
from typing import Any

import problems
import pytest
import torch
from engine import assert_same_bits
from made_up_rules import SHAPES, stepped
from torch import nn

import steepest
from steepest.errors import UserError


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_gradients_that_are_not_finite(value: float) -> None:
    def build(nonfinite: Any) -> tuple[list[nn.Parameter], steepest.Optimizer]:
        params = problems.parameters(shapes=SHAPES)
        optimizer = steepest.create("adamw", params, nonfinite=nonfinite)
        stepped(optimizer, params, range(2))
        assert params[1].grad is not None
        params[1].grad[0, 0] = value
        return params, optimizer

    params, optimizer = build("skip")
    before = copy.deepcopy([[p.detach() for p in params], optimizer.state_dict()["state"]])
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert_same_bits(params, before[0])
    for mine, theirs in zip(optimizer.state.values(), before[1].values(), strict=True):
        assert all(torch.equal(torch.as_tensor(mine[k]), torch.as_tensor(theirs[k])) for k in mine)
    _, optimizer = build("raise")
    with pytest.raises(FloatingPointError, match="not finite"):
        optimizer.step()
    params, optimizer = build("propagate")
    optimizer.step()
    assert params[1].isnan().any()
    with pytest.raises(UserError, match="nonfinite"):
        steepest.create("adamw", params, nonfinite="ignore")  # type: ignore[arg-type]


@pytest.mark.parametrize("how", ["file", "deepcopy"])
def test_the_count_of_skipped_steps_is_saved(how: str) -> None:
    param = nn.Parameter(torch.ones(3))
    optimizer = steepest.create("adamw", [param], nonfinite="skip")
    assert optimizer.skipped_steps == 0
    param.grad = torch.full((3,), torch.nan)
    optimizer.step()
    if how == "deepcopy":
        param, optimizer = copy.deepcopy((param, optimizer))
        param.grad = torch.full((3,), torch.inf)
    else:
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        optimizer = steepest.create("adamw", [param], nonfinite="skip")
        optimizer.load_state_dict(torch.load(file, weights_only=True))
    assert optimizer.skipped_steps == 1
    optimizer.step()
    assert optimizer.skipped_steps == 2


def test_a_state_without_a_count_of_skipped_steps_is_loaded() -> None:
    param = nn.Parameter(torch.ones(3))
    optimizer = steepest.create("adamw", [param], nonfinite="skip")
    optimizer.load_state_dict(steepest.create("adamw", [param]).state_dict())
    param.grad = torch.full((3,), torch.nan)
    optimizer.step()
    assert optimizer.skipped_steps == 1


def test_a_step_whose_gradients_all_are_not_finite_is_skipped_once() -> None:
    param = nn.Parameter(torch.ones(3, 2))
    optimizer = steepest.create("sophia_g", [param], nonfinite="skip")
    param.grad = torch.full_like(param, torch.nan)
    optimizer.observe(batch_tokens=10)
    param.grad = torch.full_like(param, torch.nan)
    optimizer.step()
    assert optimizer.skipped_steps == 1
