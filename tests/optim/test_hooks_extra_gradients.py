"""Rules that take gradients beside the batch's own."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import problems
import pytest
import torch
from engine import assert_same_bits
from made_up_rules import Observing
from torch import nn

import steepest
from steepest.errors import UserError


def test_extra_gradients_are_asked_for_and_needed() -> None:
    p = nn.Parameter(torch.zeros(2, 2))
    optimizer = steepest.create(Observing(), [p])
    p.grad = torch.ones(2, 2)
    assert optimizer.wants() == set()
    optimizer.step()
    assert optimizer.wants() == {"sampled_labels"}
    with pytest.raises(UserError, match="sampled_labels"):
        optimizer.step()
    p.grad = torch.full((2, 2), 3.0)
    optimizer.observe(batch_tokens=10)
    assert p.grad is None
    assert optimizer.wants() == set()
    p.grad = torch.ones(2, 2)
    optimizer.step()
    assert torch.equal(p.detach(), torch.full((2, 2), -30.0))


@pytest.mark.parametrize("how", ["file", "deepcopy", "pickle"])
def test_saved_after_the_extra_gradient_it_is_not_asked_for_again(how: str) -> None:
    p = nn.Parameter(torch.zeros(2, 2))
    optimizer = steepest.create(Observing(), [p])
    p.grad = torch.ones(2, 2)
    optimizer.step()
    p.grad = torch.full((2, 2), 3.0)
    optimizer.observe(batch_tokens=10)
    if how == "file":
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        optimizer = steepest.create(Observing(), [p])
        optimizer.load_state_dict(torch.load(file, weights_only=True))
    elif how == "deepcopy":
        p, optimizer = copy.deepcopy((p, optimizer))
    else:
        p, optimizer = pickle.loads(pickle.dumps((p, optimizer)))
    assert optimizer.wants() == set()
    for _ in range(2):
        p.grad = torch.ones(2, 2)
        optimizer.step()
    assert torch.equal(p.detach(), torch.full((2, 2), -60.0))
    assert optimizer.wants() == {"sampled_labels"}


def test_a_state_without_a_note_of_the_extra_gradient_is_loaded() -> None:
    p = nn.Parameter(torch.zeros(2, 2))
    optimizer = steepest.create(Observing(), [p])
    p.grad = torch.ones(2, 2)
    optimizer.step()
    state = optimizer.state_dict()
    del state["param_groups"][0]["observed"]
    optimizer = steepest.create(Observing(), [p])
    optimizer.load_state_dict(state)
    assert optimizer.wants() == {"sampled_labels"}
    optimizer.observe()
    assert optimizer.wants() == set()


def test_a_group_added_after_the_extra_gradient_wants_its_own() -> None:
    first, second = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    optimizer = steepest.create("sophia_g", [first])
    first.grad = torch.ones(2)
    optimizer.observe()
    optimizer.add_param_group({"params": [second]})
    assert optimizer.wants() == {"sampled_labels"}


def test_a_closure_is_also_called_at_the_previous_weights() -> None:
    p = nn.Parameter(torch.full((2,), 5.0))
    optimizer = steepest.create(Observing(kind="previous_weights", lr=0.1), [p])
    seen = []

    def closure() -> float:
        seen.append(p.detach().clone())
        optimizer.zero_grad()
        (p * p).sum().backward()
        return float((p * p).sum().detach())

    optimizer.step(closure)
    optimizer.step(closure)
    assert [float(s[0]) for s in seen] == [5.0, 5.0, 5.0]
    torch.testing.assert_close(p.detach(), torch.full((2,), 5 - 0.1 * 10.0))
    optimizer.step(closure)
    optimizer.step(closure)  # One step back from 3 (the third step moved by 1 more) is 4.
    assert [float(s[0]) for s in seen[3:]] == pytest.approx([4.0, 4.0, 3.0])


@pytest.mark.parametrize("layout", [{}, {"split": (2, 2, 2)}, {"transposed": True}])
@pytest.mark.parametrize("name", ["mars_adamw", "mars_shampoo"])
def test_the_whole_model_goes_back_to_the_previous_weights(
    name: str, layout: dict[str, Any]
) -> None:
    # Also what AdamW steps, and matrices that are stepped in blocks or turned.
    shapes = ((6, 6), (4, 6), (7,))
    params = problems.parameters(shapes=shapes)
    groups = [{"params": [params[0]], "role": "hidden", **layout}]
    groups += [{"params": [params[1]], "role": "embedding"}]
    groups += [{"params": [params[2]], "role": "vector"}]
    optimizer = steepest.create(name, groups, exact=True)
    grads = list(problems.stream(3, shapes))
    before = [p.detach().clone() for p in params]
    problems.set_gradients(params, grads[0])
    optimizer.step()
    now = [p.detach().clone() for p in params]
    assert not any(torch.equal(a, b) for a, b in zip(before, now, strict=True))
    with optimizer.previous_weights():
        assert_same_bits(params, before)
    assert_same_bits(params, now)
