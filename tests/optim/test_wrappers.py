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
    assert_same_bits,
    make,
    train,
    trained,
)
from torch import nn

from steepest.errors import UserError


@pytest.mark.parametrize("name", NAMES)
def test_cautious_masks_what_opposes_the_gradient(name: str) -> None:
    # With lr 1 and no decay a step is the direction: compare it with the plain rule's, whose
    # state is the same because neither reads the weights.
    options: dict[str, Any] = {"lr": 1.0, "weight_decay": 0.0}
    if name == "muon":
        options |= {"adam_lr": 1.0, "adam_weight_decay": 0.0}
    if name == "adafactor":  # Without a moment it never opposes the gradient.
        options |= {"beta1": 0.9}
    plain, masked = problems.parameters(torch.float64), problems.parameters(torch.float64)
    mine = {0, 1, 2} if name == "muon" else set()
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
    assert opposed > 0


@pytest.mark.parametrize("name", NAMES)
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
