"""Wrong input gets a sentence."""

from __future__ import annotations

from typing import Any

import numpy as np
import problems
import pytest
import torch
from torch import nn

import steepest
from steepest.errors import UserError


def one() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(3, 4))]


def test_unknown_names_get_the_nearest() -> None:
    with pytest.raises(UserError, match=r"'adamww'.*'adamw'"):
        steepest.create("adamww", one())
    with pytest.raises(TypeError, match=r"'beta'.*'betas'"):
        steepest.create("adamw", one(), beta=(0.9, 0.99))
    with pytest.raises(TypeError, match=r"'adam_betta'.*'adam_beta"):
        steepest.create("muon", problems.llama(), adam_betta=(0.9, 0.99))
    with pytest.raises(TypeError, match="nesterov"):
        steepest.create("adamw", one(), nesterov=True)
    with pytest.raises(UserError, match=r"'cautius'.*'cautious'"):
        steepest.create("adamw", one(), wrap=["cautius"])
    with pytest.raises(UserError, match=r"'hiden'.*'hidden'"):
        steepest.create("muon", [{"params": one(), "role": "hiden"}])
    with pytest.raises(UserError, match=r"'embeding'.*'embedding'"):
        steepest.create("adamw", one(), decay_roles=["embeding"])
    with pytest.raises(TypeError, match="'learning_rate'"):
        steepest.create("adamw", [{"params": one(), "learning_rate": 0.1}])
    with pytest.raises(TypeError, match=r"'momentun'.*'momentum'"):
        steepest.create("muon", [{"params": one(), "role": "hidden", "momentun": 0.9}])
    with pytest.raises(TypeError, match=r"'adam_bettas'.*'adam_betas'"):
        steepest.create("muon", [{"params": one(), "role": "head", "adam_bettas": (0.9, 0.9)}])
    with pytest.raises(TypeError, match=r"muon steps 'adam_lr'"):
        steepest.create("muon", [{"params": one(), "role": "hidden", "adam_lr": 0.1}])
    with pytest.raises(UserError, match=r"'adamv'.*'adamw'"):
        steepest.create("adamw", [{"params": one(), "rule": "adamv"}])


@pytest.mark.parametrize(
    "members",
    [
        nn.Parameter(torch.ones(3, 4)),
        torch.ones(3),
        {"params": one()},
        "weight",
        None,
        [torch.ones(3), 3],
        [[torch.ones(3)]],
        [(torch.ones(3), "weight")],
        [{"param": one()}],
        [{"params": ["weight"]}],
    ],
    ids=lambda members: repr(members)[:30].replace("\n", " "),
)
def test_what_is_neither_a_model_nor_parameters(members: Any) -> None:
    with pytest.raises(TypeError, match=r"goes in a list|neither a parameter|no 'params'"):
        steepest.create("adamw", members)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("adamw", "lr", "0.1"),
        ("adamw", "lr", None),
        ("adamw", "lr", True),
        ("adamw", "betas", 0.9),
        ("adamw", "betas", (0.9,)),
        ("adamw", "betas", (0.9, "0.99")),
        ("adamw", "lr", torch.ones(2, 2)),
        ("sgd", "nesterov", 1),
        ("muon", "ns_steps", 5.0),
        ("muon", "ns_steps", True),
        ("muon", "ns_dtype", torch.float32),
        ("adafactor", "beta1", "0.9"),
        ("soap", "update_interval", None),
    ],
)
def test_values_of_the_wrong_type(name: str, key: str, value: object) -> None:
    with pytest.raises(UserError, match=key):
        steepest.create(name, problems.llama(), **{key: value})


@pytest.mark.parametrize(
    "value",
    [
        1,
        np.float64(1.0),
        np.float32(1.0),
        torch.tensor(1.0),
    ],
)
def test_numbers_of_other_types_are_numbers(value: Any) -> None:
    optimizer = steepest.create("adamw", one(), lr=value)
    assert optimizer.param_groups[0]["lr"] == 1.0
    assert type(optimizer.param_groups[0]["lr"]) is float


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("adamw", {"lr": -0.1}),
        ("adamw", {"lr": float("nan")}),
        ("adamw", {"weight_decay": -0.1}),
        ("adamw", {"betas": (0.9, 1.0)}),
        ("adamw", {"betas": (-0.1, 0.9)}),
        ("muon", {"ns_dtype": "float99"}),
        ("muon", {"ns_steps": 0}),
        ("soap", {"update_interval": 0}),
    ],
)
def test_impossible_values(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(options))):
        steepest.create(name, problems.llama(), **options)


def test_muon_refuses_to_orthogonalise_a_vector() -> None:
    group = {"params": [nn.Parameter(torch.ones(3))], "role": "hidden"}
    with pytest.raises(UserError, match="muon"):
        steepest.create("muon", [group])


def test_sparse_gradients_are_refused_with_a_sentence() -> None:
    table = nn.Embedding(5, 3, sparse=True)
    optimizer = steepest.create("adamw", table)
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(UserError, match="sparse"):
        optimizer.step()


def test_a_wrapper_by_its_bare_name_is_understood() -> None:
    assert "cautious adamw" in steepest.create("adamw", one(), wrap="cautious").rules
