"""Wrappers around every rule."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import problems
import pytest
import torch
from engine import (
    NAMES,
    ROUNDED,
    assert_same_bits,
    make,
    train,
    trained,
)
from torch import nn

import steepest
from steepest.errors import UserError
from steepest.optim import catalogue
from steepest.optim.roles import Role

# The direction is along the gradient: there is nothing to mask.
NEVER_OPPOSED = {"signsgd", "adagrad", "adagrad_norm", "apollo", "apollo_mini", "sinkgd"}
# The state depends on the weights, which differ after a masked step.
READS_WEIGHTS = {"lars", "adamp", "lamb", "sgg_lamb", "scaled_adam", "prodigy"}
# A step is not the direction alone.
NOT_PLAIN = {"schedulefree_adamw", "schedulefree_sgd", *ROUNDED}
# New gradients are added to what they have.
KEEPS_GRADIENT = {name for name in NAMES if catalogue.recipe(name).rule.keeps_gradient}


@pytest.mark.parametrize(
    "name", [name for name in NAMES if name not in READS_WEIGHTS | NOT_PLAIN | KEEPS_GRADIENT]
)
def test_cautious_masks_what_opposes_the_gradient(name: str) -> None:
    # With lr 1 and no decay a step is the direction: compare it with the plain rule's, whose
    # state is the same because neither reads the weights.
    options: dict[str, Any] = {"lr": 1.0, "weight_decay": 0.0}
    recipe = catalogue.recipe(name)
    for part in recipe.parts:
        options |= {f"{part.prefix}_lr": 1.0, f"{part.prefix}_weight_decay": 0.0}
    if "constrained" in recipe.hyperparameters():  # A decay of its own.
        options |= {"constrained": False}
    if name == "adafactor":  # Without a moment it never opposes the gradient.
        options |= {"beta1": 0.9}
    plain, masked = problems.parameters(torch.float64), problems.parameters(torch.float64)
    mine = {0, 1, 2} if recipe.part_of(Role.VECTOR) else set()
    first = make(name, plain, **options)
    second = make(name, masked, wrap=["cautious"], **options)
    opposed = 0
    for step, grads in enumerate(problems.stream(8)):
        before = [p.detach().clone() for p in (*plain, *masked)]
        problems.set_gradients(plain, grads)
        problems.set_gradients(masked, grads)
        first.step()
        second.step()
        moved = [(b - p.detach()).numpy() for b, p in zip(before, (*plain, *masked), strict=True)]
        for i, g in enumerate(grads):
            u, got = moved[i], moved[len(plain) + i]
            agree = u * g.double().numpy() > 0
            expected = u * agree * (agree.size / (agree.sum() + 1))
            if i in mine:  # Vectors: the fallback is not wrapped.
                expected = u
            elif step or name != "soap":
                opposed += int(agree.size - agree.sum())
            np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-10)
    assert bool(opposed) == (name not in NEVER_OPPOSED)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in KEEPS_GRADIENT])
def test_a_wrapped_rule_saves_and_resumes(name: str) -> None:
    whole, _ = trained(name, 8, wrap=["cautious"])
    params, optimizer = trained(name, 5, wrap=["cautious"])
    fresh = [nn.Parameter(p.detach().clone()) for p in params]
    resumed = make(name, fresh, wrap=["cautious"])
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(resumed, fresh, range(5, 8))
    assert_same_bits(fresh, whole)


def test_wrapping_does_not_hide_what_decides_the_state() -> None:
    params, optimizer = trained("sgd", 2, wrap=["cautious"], momentum=0.0)
    optimizer.param_groups[0]["momentum"] = 0.9
    with pytest.raises(UserError, match="momentum"):
        train(optimizer, params, [2])


@pytest.mark.parametrize("wrap", ["stochastic_rounding", "kahan"])
def test_small_steps_of_bfloat16_weights_add_up(wrap: str) -> None:
    # 2000 steps of 1e-5 from 1, each far below bfloat16's last place there, 2^-8.
    ends = {}
    for wrapped in ((), (wrap,)):
        param = nn.Parameter(torch.ones(64, 32, dtype=torch.bfloat16))
        optimizer = make("sgd", [param], wrap=wrapped, lr=1e-5, momentum=0.0, weight_decay=0.0)
        for _ in range(2000):
            param.grad = torch.ones_like(param)
            optimizer.step()
        ends[wrapped] = float(param.detach().double().mean())
    assert ends[()] == 1.0
    assert ends[wrap,] == pytest.approx(0.98, abs=1e-3)


def test_rounding_reaches_parameters_that_other_rules_step() -> None:
    vector = nn.Parameter(torch.ones(512, dtype=torch.bfloat16))
    groups = [{"params": [vector], "role": "vector"}]
    optimizer = steepest.create("muon", groups, wrap="stochastic_rounding", adam_lr=1e-4)
    vector.grad = torch.ones_like(vector)
    optimizer.step()
    moved = float((vector != 1).double().mean())
    assert 0 < moved < 0.2


def test_a_name_of_both_is_the_inner_rules() -> None:
    param = nn.Parameter(torch.ones(4, 4))
    optimizer = make("soap", [param], wrap=["lookahead"], lookahead_update_interval=5)
    assert optimizer.param_groups[0]["update_interval"] == 3
    assert optimizer.param_groups[0]["lookahead_update_interval"] == 5
    optimizer = make("sgd", [param], wrap=["lookahead"], update_interval=5)
    assert optimizer.param_groups[0]["update_interval"] == 5
    with pytest.raises(UserError, match="at least 1"):
        make("soap", [param], wrap=["lookahead"], lookahead_update_interval=0)


def test_wrappers_in_an_order_that_makes_no_sense() -> None:
    param = nn.Parameter(torch.ones(4, 4))
    with pytest.raises(UserError, match=r"stochastic_rounding.*last"):
        make("adamw", [param], wrap=["stochastic_rounding", "cautious"])
    with pytest.raises(UserError, match=r"lookahead.*already"):
        make("adamw", [param], wrap=["lookahead", "lookahead"])
    for wrap in ("cautious", "adaptive_clipping"):
        with pytest.raises(UserError, match=rf"{wrap} looks at new gradients.*ScionLight"):
            make("scion_light", [param], wrap=[wrap])


EVERY = [name for name in catalogue.WRAPPERS if name != "quantised"]


@pytest.mark.parametrize("wrap", EVERY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["adamw", "soap", "adan", "sgg_lamb", "kron", "schedulefree_sgd"])
def test_every_wrapper_steps_saves_and_resumes(name: str, dtype: torch.dtype, wrap: str) -> None:
    whole = problems.parameters(dtype)
    train(make(name, whole, wrap=[wrap]), whole, range(8))
    params = problems.parameters(dtype)
    optimizer = make(name, params, wrap=[wrap])
    train(optimizer, params, range(5))
    fresh = [nn.Parameter(p.detach().clone()) for p in params]
    resumed = make(name, fresh, wrap=[wrap])
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(resumed, fresh, range(5, 8))
    assert_same_bits(fresh, whole)
    assert all(p.isfinite().all() for p in whole)


@pytest.mark.parametrize("wrap", EVERY)
@pytest.mark.parametrize("name", ["adamw", "adan", "shampoo"])
def test_wrapped_runs_together_are_runs_apart(name: str, wrap: str) -> None:
    shapes = ((7,), (6, 5), (6, 5))
    own = {"growth_limiter": {"growth_limit": (1.01, 1.5)}, "lookahead": {"alpha": (0.5, 0.8)}}
    values = own.get(wrap, {})
    together = [nn.Parameter(torch.stack([p, 2 * p])) for p in problems.parameters(shapes=shapes)]
    options = {k: torch.tensor(v, dtype=torch.float64) for k, v in values.items()}
    groups = [{"params": together, "weight_decay": 0.1}]
    optimizer = steepest.create(name, groups, runs=2, wrap=wrap, lr=1e-2, **options)
    apart, single = [], []
    for run in range(2):
        apart.append([nn.Parameter(p[run].detach().clone()) for p in together])
        own_groups = [{"params": apart[run], "weight_decay": 0.1}]
        options = {k: v[run] for k, v in values.items()}
        single.append(steepest.create(name, own_groups, wrap=wrap, lr=1e-2, **options))
    for grads in problems.stream(8, shapes):
        problems.set_gradients(together, [torch.stack([g, -g]) for g in grads])
        optimizer.step()
        for run, each in enumerate(single):
            problems.set_gradients(apart[run], [(1 - 2 * run) * g for g in grads])
            each.step()
    for run in range(2):
        for p, q in zip(together, apart[run], strict=True):
            torch.testing.assert_close(p[run], q, rtol=1e-6, atol=1e-6)
