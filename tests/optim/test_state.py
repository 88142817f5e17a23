"""State: saved, loaded, copied, counted."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

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

import steepest
from steepest.errors import UserError


@pytest.mark.parametrize("how", ["file", "deepcopy", "pickle"])
@pytest.mark.parametrize("name", NAMES)
def test_saved_in_the_middle_it_continues_to_the_bit(name: str, how: str) -> None:
    whole, finished = trained(name, 8)
    params, optimizer = trained(name, 5)
    resumed: Any
    if how == "file":
        file = io.BytesIO()
        torch.save([optimizer.state_dict(), [p.detach() for p in params]], file)
        file.seek(0)
        state, values = torch.load(file, weights_only=True)
        copied: Any = [nn.Parameter(v) for v in values]
        resumed = make(name, copied, lr=0.5)  # A fresh optimizer takes lr and all from the file.
        resumed.load_state_dict(state)
    elif how == "deepcopy":
        copied, resumed = copy.deepcopy((params, optimizer))
    else:
        copied, resumed = pickle.loads(pickle.dumps((params, optimizer)))
    train(optimizer, params, [2, 3])  # The original shares no memory with what was loaded.
    train(resumed, copied, range(5, 8))
    assert_same_bits(copied, whole)
    for p, q in zip(copied, whole, strict=True):
        assert resumed.state[p].keys() == finished.state[q].keys()
        for key, value in resumed.state[p].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(finished.state[q][key]))


def test_loading_into_a_used_optimizer_replaces_its_state() -> None:
    whole, _ = trained("adamw", 8)
    params, optimizer = trained("adamw", 5)
    saved = copy.deepcopy(optimizer.state_dict())
    values = [p.detach().clone() for p in params]
    train(optimizer, params, [0, 1, 2])
    optimizer.load_state_dict(saved)
    with torch.no_grad():
        for p, v in zip(params, values, strict=True):
            p.copy_(v)
    train(optimizer, params, range(5, 8))
    assert_same_bits(params, whole)


@pytest.mark.parametrize(("name", "key"), [("adamw", "amsgrad"), ("signum", "nesterov")])
def test_saved_before_a_hyperparameter_existed(name: str, key: str) -> None:
    whole, _ = trained(name, 8)
    params, optimizer = trained(name, 5)
    saved = copy.deepcopy(optimizer.state_dict())
    for group in saved["param_groups"]:
        del group[key]
    fresh = [nn.Parameter(p.detach().clone()) for p in params]
    resumed = make(name, fresh)
    resumed.load_state_dict(saved)
    train(resumed, fresh, range(5, 8))
    assert_same_bits(fresh, whole)


def test_loading_a_live_state_dict_shares_no_memory() -> None:
    params, optimizer = trained("adamw", 3)
    others = [nn.Parameter(p.detach().clone()) for p in params]
    other = make("adamw", others)
    other.load_state_dict(optimizer.state_dict())
    train(other, others, [3])
    train(optimizer, params, [3])
    assert_same_bits(params, others)


@pytest.mark.parametrize(
    "name",
    NAMES,
)
def test_bfloat16_parameters_keep_float32_state(name: str) -> None:
    params = problems.parameters(torch.bfloat16)
    optimizer = make(name, params)
    train(optimizer, params, range(4))
    fresh = problems.parameters(torch.bfloat16)
    resumed = make(name, fresh)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    with torch.no_grad():
        for p, q in zip(fresh, params, strict=True):
            p.copy_(q)
    for group in (optimizer, resumed):
        for state in group.state.values():
            tensors = [v for v in state.values() if isinstance(v, torch.Tensor)]
            assert all(v.dtype == torch.float32 for v in tensors if v.is_floating_point())
    train(optimizer, params, [4, 5])
    train(resumed, fresh, [4, 5])
    assert_same_bits(fresh, params)


def test_bfloat16_gradients_reach_float32_state_unrounded() -> None:
    param = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    optimizer = make("adamw", [param], betas=(0.9, 0.999))
    for _ in range(3):
        param.grad = torch.full_like(param, 1e-3)
        optimizer.step()
    g = float(torch.tensor(1e-3, dtype=torch.bfloat16))
    expected = torch.full((3,), g * g * (1 - 0.999**3))
    torch.testing.assert_close(optimizer.state[param]["exp_avg_sq"], expected, rtol=1e-5, atol=0)


def test_state_of_another_optimizer_is_refused() -> None:
    params, adamw = trained("adamw", 2)
    with pytest.raises(UserError, match=r"adamw.*lion"):
        make("lion", params).load_state_dict(adamw.state_dict())
    torchs = torch.optim.AdamW(params)
    train(torchs, params, [0])
    with pytest.raises(ValueError, match=r"adamw|different"):
        make("adamw", params).load_state_dict(torchs.state_dict())


def test_state_of_another_model_is_refused() -> None:
    first = [nn.Parameter(torch.zeros(3, 4))]
    optimizer = make("soap", first)
    train(optimizer, first, [0, 1], [(3, 4)])
    second = [nn.Parameter(torch.zeros(4, 3))]
    with pytest.raises(UserError, match=r"shape \(4, 3\)"):
        make("soap", second).load_state_dict(optimizer.state_dict())


# Defaults that decide the state, where `make` has others.
AS_DESCRIBED: dict[str, dict[str, Any]] = {
    "soap": {"update_interval": 10},
    "rmsprop": {"momentum": 0.0},
    "dion": {"rank": 768},
    "cosmos": {"rank": 64},
    "scale": {"momentum": 0.0},
    "galore_adamw": {"rank": 128},
    "galore_adafactor": {"rank": 128},
    "galore_adamw8bit": {"rank": 128},
    "fira": {"rank": 128},
    "apollo": {"rank": 256},
    "q_apollo": {"rank": 256},
    "q_galore": {"rank": 128, "queue_size": 5},
}


@pytest.mark.parametrize("name", NAMES)
def test_state_bytes_are_those_of_the_state_and_of_the_description(name: str) -> None:
    param = nn.Parameter(torch.randn(256, 128))
    optimizer = make(name, [param], **AS_DESCRIBED.get(name, {}))
    told = optimizer.state_bytes()
    param.grad = torch.randn_like(param)
    optimizer.step()
    tensors = [v for v in optimizer.state[param].values() if isinstance(v, torch.Tensor)]
    held = sum(t.numel() * t.element_size() for t in tensors)
    assert told == held == optimizer.state_bytes()
    description = steepest.describe(name)
    assert description.state_bytes_per_parameter * param.numel() == held
    assert description.state == {
        k: tuple(v.shape) for k, v in optimizer.state[param].items() if isinstance(v, torch.Tensor)
    }


@pytest.mark.parametrize("name", NAMES)
def test_state_bytes_of_many_shapes_count_every_tensor_once(name: str) -> None:
    params, optimizer = trained(name, 2)
    held = [v for p in params for v in optimizer.state[p].values()]
    tensors = [v for v in held if isinstance(v, torch.Tensor)]
    assert optimizer.state_bytes() == sum(t.numel() * t.element_size() for t in tensors)
