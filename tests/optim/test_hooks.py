"""What rules may ask of the engine beside gradients: sums, memory, work before a step."""

from __future__ import annotations

import copy
import io
from dataclasses import dataclass
from typing import ClassVar

import problems
import pytest
import torch
from engine import assert_same_bits
from made_up_rules import (
    SHAPES,
    Averaging,
    ByMedian,
    Counting,
    Delayed,
    Normed,
    Remembering,
    stepped,
)
from torch import nn

import steepest


@pytest.mark.parametrize("compile", [False, True])
def test_sums_over_all_parameters(compile: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)
    params = problems.parameters(torch.float64, SHAPES)
    groups = [{"params": params[:1], "lr": 0.1}, {"params": params[1:], "lr": 0.2}]
    optimizer = steepest.create(Normed(), groups, compile=compile)
    before = [p.detach().clone() for p in params]
    for count, grads in enumerate(problems.stream(2, SHAPES), start=1):
        problems.set_gradients(params, grads)
        optimizer.step()
        norm = torch.cat([g.double().flatten() for g in grads]).norm()
        for i, (p, p0, g) in enumerate(zip(params, before, grads, strict=True)):
            expected = p0 - (0.2 if i else 0.1) * g.double() / norm * count
            torch.testing.assert_close(p.detach(), expected, rtol=1e-12, atol=1e-14)
        before = [p.detach().clone() for p in params]


def test_shared_values_are_saved_and_of_each_run() -> None:
    params = problems.parameters(torch.float64, SHAPES)
    optimizer = steepest.create(Normed(), params)
    stepped(optimizer, params, range(3))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    fresh = [nn.Parameter(p.detach().clone()) for p in params]
    resumed = steepest.create(Normed(), fresh)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    stepped(optimizer, params, range(3, 5))
    stepped(resumed, fresh, range(3, 5))
    assert_same_bits(fresh, params)
    both = nn.Parameter(torch.zeros(2, 3))
    runs = steepest.create(Normed(), [both], runs=2)
    both.grad = torch.tensor([[3.0, 4.0, 0.0], [0.0, 0.0, 2.0]])
    runs.step()
    torch.testing.assert_close(both.detach(), torch.tensor([[-0.06, -0.08, 0], [0, 0, -0.1]]))


@pytest.mark.parametrize("runs", [None, 2])
def test_medians_over_all_parameters(runs: int | None) -> None:
    shapes = SHAPES if runs is None else tuple((2, *s) for s in SHAPES)
    params = problems.parameters(torch.float64, shapes)
    optimizer = steepest.create(ByMedian(), params, runs=runs, compile=False)
    medians = torch.ones(runs or 1, dtype=torch.float64)
    for step, grads in enumerate(problems.stream(3, shapes), start=1):
        before = [p.detach().clone() for p in params]
        problems.set_gradients(params, grads)
        optimizer.step()
        if step == 2:
            rows = [g.double().abs().reshape(runs or 1, -1) for g in grads[:2]]
            medians = torch.cat(rows, 1).median(1).values
        for p, p0, g in zip(params, before, grads, strict=True):
            by = medians.view(-1, *[1] * (g.ndim - 1)) if runs else medians[0]
            torch.testing.assert_close(p.detach(), p0 - 0.1 * g.double() / by)
    assert optimizer.param_groups[0]["shared"]["count"].flatten()[0] == 12 + 12 + 5 + 1


def test_memory_adds_up_past_values_of_each_parameter() -> None:
    params = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3))]
    optimizer = steepest.create(Remembering(), params)
    for lr, present in ((0.1, (0, 1)), (0.2, (1,)), (0.4, (0, 1))):
        optimizer.param_groups[0]["lr"] = lr
        for i, p in enumerate(params):
            p.grad = torch.ones_like(p) if i in present else None
        optimizer.step()
    torch.testing.assert_close(params[0].detach(), torch.full((2,), -(0.1 + 0.5)))
    torch.testing.assert_close(params[1].detach(), torch.full((3,), -(0.1 + 0.3 + 0.7)))
    saved = copy.deepcopy(optimizer.state_dict())
    assert saved["state"][0]["lr_sum"] == pytest.approx(0.5)


def test_preparing_and_moving() -> None:
    params = problems.parameters(shapes=SHAPES)
    optimizer = steepest.create(Counting(inner=Averaging()), params)
    stepped(optimizer, params, range(3))
    grads = list(problems.stream(3, SHAPES))
    for p, g in zip(params, grads[1], strict=True):
        assert float(optimizer.state[p]["count"]) == 3
        torch.testing.assert_close(optimizer.state[p]["ready"], g.sum())


@dataclass(frozen=True)
class DelayedElements(Delayed):
    """The same, stepped by elements."""

    elementwise: ClassVar[bool] = True


@pytest.mark.parametrize("rule", [Delayed(), DelayedElements()])
def test_a_rule_may_return_what_it_was_given(rule: steepest.Rule) -> None:
    params = problems.parameters(shapes=SHAPES)
    before = [p.detach().clone() for p in params]
    stepped(steepest.create(rule, params), params, range(3))
    first = next(iter(problems.stream(1, SHAPES)))
    assert_same_bits(params, [p - 0.1 * g for p, g in zip(before, first, strict=True)])
