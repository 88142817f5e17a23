"""Rules that have other weights for evaluation than for training."""

from __future__ import annotations

import io

import problems
import pytest
import torch
from engine import assert_same_bits
from made_up_rules import SHAPES, Averaging, stepped
from torch import nn

import steepest
from steepest.errors import UserError


def test_evaluation_weights_come_and_go_to_the_bit() -> None:
    params = problems.parameters(shapes=SHAPES)
    optimizer = steepest.create(Averaging(), params)
    optimizer.eval()  # Before any step there is nothing to average.
    assert_same_bits(params, problems.parameters(shapes=SHAPES))
    stepped(optimizer, params, range(2))
    trained = [p.detach().clone() for p in params]
    optimizer.eval()
    optimizer.eval()
    assert_same_bits(params, [p / 2 for p in trained])
    with pytest.raises(UserError, match=r"evaluation mode.*train\(\)"):
        optimizer.step()
    optimizer.train()
    assert_same_bits(params, trained)
    optimizer.train()
    assert_same_bits(params, trained)


def test_saved_in_evaluation_mode_it_continues_to_the_bit() -> None:
    # As a trainer does that evaluates and then saves.
    params = problems.parameters(shapes=SHAPES)
    optimizer = steepest.create(Averaging(), params)
    stepped(optimizer, params, range(2))
    optimizer.eval()
    file = io.BytesIO()
    torch.save([optimizer.state_dict(), [p.detach() for p in params]], file)
    file.seek(0)
    state, values = torch.load(file, weights_only=True)
    fresh = [nn.Parameter(v) for v in values]
    resumed = steepest.create(Averaging(), fresh)
    resumed.load_state_dict(state)
    with pytest.raises(UserError, match="evaluation mode"):
        resumed.step()
    optimizer.train()
    resumed.train()
    assert_same_bits(fresh, params)
    stepped(optimizer, params, range(2, 4))
    stepped(resumed, fresh, range(2, 4))
    assert_same_bits(fresh, params)
    assert "training_param" not in resumed.state_dict()["state"][0]


def test_evaluation_mode_without_its_training_weights_is_refused() -> None:
    params = problems.parameters(shapes=SHAPES)
    optimizer = steepest.create(Averaging(), params)
    stepped(optimizer, params, range(2))
    optimizer.eval()
    state = optimizer.state_dict()
    for own in state["state"].values():
        own.pop("training_param", None)
    with pytest.raises(UserError, match=r"training weights are not in it.*train\(\)"):
        optimizer.load_state_dict(state)
