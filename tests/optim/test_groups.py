"""Parameter groups, schedulers, closures, live and static hyperparameters."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import problems
import pytest
import torch
from engine import (
    LR,
    NAMES,
    SHARED,
    another_choice,
    assert_same_bits,
    knob,
    make,
    moved_alike,
    take_key,
    train,
    trained,
)
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR

import steepest
from steepest.errors import UserError


@pytest.mark.parametrize("name", [name for name in NAMES if name not in SHARED])
def test_groups_added_after_steps(name: str) -> None:
    early, late = problems.parameters(seed=0), problems.parameters(seed=1)
    both = problems.parameters(seed=0), problems.parameters(seed=1)
    optimizer = make(name, early)
    apart = make(name, both[0])
    train(optimizer, early, range(3))
    train(apart, both[0], range(3))
    for group in make(name, late).param_groups:
        optimizer.add_param_group({k: v for k, v in group.items() if k != "param_names"})
    second = make(name, both[1])
    for mine, theirs in zip(both[1], late, strict=True):
        take_key(second, mine, optimizer, theirs)
    for grads in problems.stream(4):
        for params in (early, late, *both):
            problems.set_gradients(params, grads)
        for each in (optimizer, apart, second):
            each.step()
    assert_same_bits([*early, *late], [*both[0], *both[1]])
    assert optimizer.state[late[0]]["step"] == 4


def test_a_refused_group_leaves_the_optimizer_as_it_was() -> None:
    params, optimizer = trained("adamw", 2)
    groups = len(optimizer.param_groups)
    with pytest.raises(TypeError, match="did you mean 'betas'"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "beta": (0.9, 0.9)})
    with pytest.raises(ValueError, match=r"more than one parameter group|duplicate"):
        optimizer.add_param_group({"params": [params[0]]})
    assert len(optimizer.param_groups) == groups
    train(optimizer, params, [2])
    whole, _ = trained("adamw", 3)
    assert_same_bits(params, whole)


def test_groups_take_the_names_that_create_takes() -> None:
    def group(role: str, **own: Any) -> dict[str, Any]:
        params = [nn.Parameter(torch.ones(3, 4))]
        return steepest.create("muon", [{"params": params, "role": role, **own}]).param_groups[0]

    assert group("embedding", adam_lr=0.1, adam_betas=(0.5, 0.6))["betas"] == (0.5, 0.6)
    assert group("embedding", adam_lr=0.1)["lr"] == group("embedding", lr=0.1)["lr"] == 0.1
    assert group("embedding", lr=0.02, adam_lr=0.1)["lr"] == 0.1  # the same for every group
    assert group("embedding", adam_weight_decay=0.1)["weight_decay"] == 0.1
    assert group("embedding", rule="muon", lr=0.3)["momentum"] == 0.95
    assert group("hidden", rule="adamw", adam_lr=0.3)["lr"] == 0.3


@pytest.mark.parametrize("scheduler", ["lambda", "cosine"])
@pytest.mark.parametrize("name", NAMES)
def test_schedulers_are_setting_lr_by_hand(name: str, scheduler: str) -> None:
    params, optimizer = problems.parameters(), None
    optimizer = make(name, params)
    scale: Any = problems.cosine
    made: Any = LambdaLR(optimizer, scale)
    if scheduler == "cosine":
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"]
        made = CosineAnnealingLR(optimizer, 8)
        scale = lambda step: 0.5 * (1 + np.cos(np.pi * step / 8))  # noqa: E731
    byhand = problems.parameters()
    other = make(name, byhand)
    base = [group["lr"] for group in other.param_groups]
    start = problems.parameters()
    for step, grads in enumerate(problems.stream(8)):
        problems.set_gradients(params, grads)
        problems.set_gradients(byhand, grads)
        optimizer.step()
        made.step()
        for group, lr in zip(other.param_groups, base, strict=True):
            group["lr"] = float(lr * scale(step))
        other.step()
    for a, b, p0 in zip(params, byhand, start, strict=True):
        moved_alike(a, b, p0)


def test_schedule_survives_a_save() -> None:
    def build() -> tuple[list[nn.Parameter], Any, Any]:
        params = problems.parameters()
        optimizer = make("adamw", params)
        return params, optimizer, LambdaLR(optimizer, problems.cosine)

    def run(parts: tuple[list[nn.Parameter], Any, Any], steps: range) -> None:
        for step in steps:
            train(parts[1], parts[0], [step])
            parts[2].step()

    whole, first, second = build(), build(), build()
    run(whole, range(8))
    run(first, range(4))
    for ours, theirs in zip(second[1:], first[1:], strict=True):
        ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    with torch.no_grad():
        for p, q in zip(second[0], first[0], strict=True):
            p.copy_(q)
    run(second, range(4, 8))
    assert_same_bits(second[0], whole[0])


def test_closure() -> None:
    model = problems.llama()
    optimizer = make("adamw", model)
    batch = problems.batches()[0]

    def closure() -> float:
        assert torch.is_grad_enabled()
        return problems.backward(model, batch)

    losses = [optimizer.step(closure) for _ in range(5)]
    assert losses == sorted(losses, reverse=True)
    assert optimizer.state[model.lm_head.weight]["step"] == 5
    assert optimizer.step() is None


def test_hooks_run() -> None:
    params, optimizer = trained("lion", 1)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))
    train(optimizer, params, [1])
    assert seen == ["pre", "post"]


CHANGES: dict[str, dict[str, Any]] = {
    "lr": {"lr": 2 * LR},
    "weight_decay": {"weight_decay": 0.3},
    "momentum": {"momentum": 0.5},
    "nesterov": {"nesterov": None},
    "betas": {"betas": (0.5, 0.6)},
    "eps": {"eps": 1e-1},
    "beta1": {"beta1": 0.8},
    "decay_rate": {"decay_rate": 0.3},
    "clip_threshold": {"clip_threshold": 0.2},
    "ns_steps": {"ns_steps": 2},
    "ns_dtype": {"ns_dtype": "bfloat16"},
    "shampoo_beta": {"shampoo_beta": 0.3},
    "update_interval": {"update_interval": 2},
    "max_precond_dim": {"max_precond_dim": 8},
    "alpha": {"alpha": 0.5},
    "beta3": {"beta3": 0.5},
    "bias_correction": {"bias_correction": None},
    "blocks": {"blocks": 1},
    "d0": {"d0": 1e-2},
    "d_coef": {"d_coef": 0.5},
    "eps2": {"eps2": 0.1},
    "growth_rate": {"growth_rate": 1.2},
    "r": {"r": 1.0},
    "rho": {"rho": 1e3},
    "safeguard_warmup": {"safeguard_warmup": None},
    "warmup_steps": {"warmup_steps": 5},
    "weight_lr_power": {"weight_lr_power": 1.0},
    "amsgrad": {"amsgrad": None},
    "centered": {"centered": None},
    "initial_accumulator": {"initial_accumulator": 0.3},
    "momentum_decay": {"momentum_decay": 0.5},
    "rectify": {"rectify": None},
    "trust_coefficient": {"trust_coefficient": 0.5},
    "rank": {"rank": 3},
    "scale": {"scale": 0.5},
    "growth_limit": {"growth_limit": 1.5},
    "group_size": {"group_size": 10},
    "block_size": {"block_size": 10},
    "projection_bits": {"projection_bits": 2},
    "cos_threshold": {"cos_threshold": 1.1},
    "queue_size": {"queue_size": 3},
    "alpha_warmup": {"alpha_warmup": 20},
    "beta3_warmup": {"beta3_warmup": 20},
    "delta": {"delta": 0.1},
    "wd_ratio": {"wd_ratio": 1.0},
    "scale_lr": {"scale_lr": 0.5},
    "min_rms": {"min_rms": 1.0},
    "max_rms": {"max_rms": 1e-3},
    "gammas": {"gammas": (0.5, 0.6, 0.7)},
    "reset_interval": {"reset_interval": 2},
    "gamma": {"gamma": 0.5},
    "exact": {"exact": None},
    "beta": {"beta": 0.5},
    "beta2": {"beta2": 0.5},
    "center": {"center": None},
    "constrained": {"constrained": None},
    "iterations": {"iterations": 2},
    "reorthogonalise": {"reorthogonalise": None},
    "shape_scale": {"shape_scale": None},
    "exponent": {"exponent": 0.4},
    "graft_eps": {"graft_eps": 1e-2},
    "start_preconditioning_step": {"start_preconditioning_step": 2},
    "precond_lr": {"precond_lr": 0.3},
    "precond_init_scale": {"precond_init_scale": 2.0},
    "probability": {"probability": (0.5, 0.1)},
    "probability_decay": {"probability_decay": 1.0},
    "probability_start": {"probability_start": 3},
    "max_size_triangular": {"max_size_triangular": 8},
    "memory_save_mode": {"memory_save_mode": "one_diag"},
    "momentum_into_precond_update": {"momentum_into_precond_update": None},
    "n_clusters": {"n_clusters": 2},
    "recluster_interval": {"recluster_interval": 2},
    "scale_bound": {"scale_bound": (0.9, 1.1)},
}
# It takes a beta above the square of its momentum; the part of scale without momentum has no state.
OTHERS = {
    ("mudam", "shampoo_beta"): 0.99,
    ("scale", "head_momentum"): 0.5,
    ("kron", "clip_threshold"): 1e-3,
    **dict.fromkeys([(f"sgg_{base}", "beta3") for base in ("adamw", "lamb", "shampoo")], 0.8),
}
# radam has no denominator before its sixth step, and prodigy's d grows after as many.
UNSEEN = {
    # Vectors alone: not decayed, and their second moments only grow.
    ("scale", "adam_weight_decay"),
    ("scale", "adam_amsgrad"),
}
STEPS_TO_SEE = {"radam": 8, "prodigy": 8}
DECIDES_STATE = {
    "beta1",
    "max_precond_dim",
    "amsgrad",
    "centered",
    "exact",
    "rank",
    "blocks",
    "grafting",
    "memory_save_mode",
    "max_size_triangular",
    "n_clusters",
}
# One optimizer of each kind that the engine treats differently.
KINDS = {
    "adamw",
    "muon",
    "soap",
    "prodigy",
    "schedulefree_adamw",
    "galore_adamw",
    "scion",
    "mars_lion",
}
KNOBS = [(name, key) for name in NAMES for key in steepest.describe(name).hyperparameters]


def changed(name: str, key: str) -> Any:
    """Return a value of a hyperparameter other than what `make` gives it."""
    plain, _ = knob(name, key)
    if (name, key) in OTHERS:
        return OTHERS[name, key]
    default = steepest.describe(name).hyperparameters[key][0]
    if (choice := another_choice(name, key, default)) is not None:
        return choice
    value = CHANGES[plain][plain]
    if plain == "betas":
        value = (*value, 0.7)[: len(steepest.describe(name).hyperparameters[key][0])]
    return value if value is not None else not default


@pytest.mark.parametrize(
    ("name", "key"),
    # A second gradient, or larger tensors, would be needed to see these.
    [k for k in KNOBS if k[1] not in ("exact", "block_size") and k not in UNSEEN],
)
def test_every_hyperparameter_changes_the_update(name: str, key: str) -> None:
    # Through create; all five roles of knobs: a LLaMA has hidden, embedding, head and vector.
    results = []
    for options in ({}, {key: changed(name, key)}):
        model = problems.llama()
        optimizer = make(name, model, **options)
        for batch in problems.batches(STEPS_TO_SEE.get(name, 4)):
            problems.backward(model, batch)
            optimizer.step()
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert results[1].isfinite().all()
    assert not torch.allclose(results[0], results[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "key"),
    # What decides the state can't change: see the errors below.
    [k for k in KNOBS if k[0] in KINDS and k[1].removeprefix("adam_") not in DECIDES_STATE],
)
def test_changed_in_param_groups_it_is_as_if_made_so(name: str, key: str) -> None:
    value = changed(name, key)
    live, made = problems.parameters(), problems.parameters()
    first, second = make(name, live), make(name, made)
    train(first, live, range(3))
    train(second, made, range(3))
    plain, rules = knob(name, key)
    for group in first.param_groups:
        if group["rule"] in rules and (plain != "weight_decay" or group["weight_decay"]):
            group[plain] = value
    other = make(name, made, **{key: value})
    saved = copy.deepcopy(second.state_dict())
    for mine, theirs in zip(saved["param_groups"], other.state_dict()["param_groups"], strict=True):
        mine.update({k: v for k, v in theirs.items() if k != "params"})
    other.load_state_dict(saved)
    train(first, live, range(3, 7))
    train(other, made, range(3, 7))
    assert_same_bits(live, made)


def test_what_decides_the_state_cannot_change_on_the_way() -> None:
    params, optimizer = trained("sgd", 2)
    optimizer.param_groups[0]["momentum"] = 0.0
    with pytest.raises(UserError, match=r"momentum.*0\.9.*0\.0"):
        train(optimizer, params, [2])
    params, optimizer = trained("adafactor", 2)
    optimizer.param_groups[0]["beta1"] = 0.9
    with pytest.raises(UserError, match="exp_avg"):
        train(optimizer, params, [2])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lr", 1),
        ("betas", [0.9, 0.99]),
        ("betas", (0, 0.99)),
        ("lr", "tensor"),
    ],
)
def test_live_values_of_kindred_types(key: str, value: Any) -> None:
    # What create accepts, an assignment to param_groups has to accept as well.
    value = torch.tensor(0.5) if value == "tensor" else value
    params, optimizer = trained("adamw", 2)
    others, _ = trained("adamw", 2)
    other = make("adamw", others, **{key: value})
    for p, q in zip(params, others, strict=True):
        other.state[q] = copy.deepcopy(dict(optimizer.state[p]))
    for group in optimizer.param_groups:
        group[key] = value
    train(optimizer, params, [2])
    train(other, others, [2])
    assert_same_bits(params, others)
