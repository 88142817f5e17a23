"""What holds for every optimizer of the catalogue."""

from __future__ import annotations

import functools
from typing import Any

import problems
import pytest
import torch
from engine import another_choice
from torch import nn

import steepest
from steepest.optim import catalogue

NAMES = steepest.names()
SHAPES = {
    "hidden": ((8, 8), (12, 5), (5, 12)),
    "embedding": ((20, 8),),
    "head": ((20, 8),),
    "vector": ((7,), ()),
}
# Values that some hyperparameters take to be seen, where a tenth more is not enough or not allowed.
OTHER: dict[str, Any] = {
    "ns_dtype": "float32",
    "eps": 1e-3,
    "coefficients": "polar_express",
    "update_interval": 3,
    "rank": 2,
    "scale_type": "tensor",
    "growth_limit": 1.2,
    "group_size": 10,
    "alpha_warmup": 40,
    "beta3_warmup": 40,
    "delta": 2.0,
    "growth_rate": 1.01,
    "warmup_steps": 5,
    "min_rms": 1.0,
    "max_rms": 0.1,
    "reset_interval": 5,
    "max_precond_dim": 6,
    "max_size_triangular": 6,
    "memory_save_mode": "one_diag",
    "start_preconditioning_step": 2,
    "accumulate": "sum",
    "grafting": "sgd",
    "recluster_interval": 5,
}
# What an optimizer needs for a hyperparameter to matter at all within a few steps.
CONTEXT: dict[tuple[str, str], dict[str, Any]] = {
    ("apollo_mini", "scale_type"): {"scale_type": "channel"},
    ("fira", "growth_limit"): {"rank": 2},
    ("prodigy", "safeguard_warmup"): {"lr": 0.5},
    ("schedulefree_adamw", "weight_lr_power"): {"warmup_steps": 5},
    ("schedulefree_sgd", "weight_lr_power"): {"warmup_steps": 5},
    ("kron", "probability_decay"): {"probability_start": 1, "probability_decay": 0.24},
    ("kron", "probability_start"): {"probability_start": 1, "probability_decay": 0.5},
    **{
        (name, key): {"update_interval": 3}
        for name in ("shampoo", "sgg_shampoo")
        for key in ("shampoo_beta", "eps", "exponent", "accumulate", "max_precond_dim")
    },
    **{
        (name, key): {"recluster_interval": 5}
        for name in ("sgg_adamw", "sgg_lamb", "sgg_shampoo")
        for key in ("n_clusters", "beta3", "scale_bound")
    },
}


# Values for one optimizer alone.
SPECIAL: dict[tuple[str, str], Any] = {
    ("rmnp", "eps"): 10.0,  # A floor of norms.
    ("scale", "eps"): 10.0,
    ("sinkgd", "eps"): 10.0,
    ("mudam", "shampoo_beta"): 0.99,  # It has to be above the square of the momentum.
}


def groups(dtype: torch.dtype = torch.float64) -> list[dict[str, Any]]:
    """Return seeded parameters of every role."""
    flat = iter(problems.parameters(dtype, [s for shapes in SHAPES.values() for s in shapes]))
    return [
        {"params": [next(flat) for _ in shapes], "role": role} for role, shapes in SHAPES.items()
    ]


def trained(name: str, steps: int = 12, **options: Any) -> list[nn.Parameter]:
    """Return parameters after some steps of a fixed stream, everything decayed."""
    made = groups()
    decay = {"weight_decay": 0.1}
    if "adam_weight_decay" in steepest.describe(name).hyperparameters:
        decay["adam_weight_decay"] = 0.1
    options = {**decay, **options}
    optimizer = steepest.create(name, made, compile=False, decay_roles=SHAPES, **options)
    params = [p for group in made for p in group["params"]]
    shapes = [tuple(p.shape) for p in params]
    for grads in problems.stream(steps, shapes):
        if optimizer.wants():
            problems.set_gradients(params, [0.5 * g.flip(0) if g.ndim else g for g in grads])
            optimizer.observe(batch_tokens=10)
        problems.add_gradients(optimizer, params, grads)
        optimizer.step()
    optimizer.eval()
    return [p.detach() for p in params]


@functools.cache
def plain(name: str, **options: Any) -> list[nn.Parameter]:
    return trained(name, **options)


def changed(key: str, value: Any) -> Any:
    """Return another valid value of a hyperparameter."""
    bare = next((known for known in OTHER if key == known or key.endswith(f"_{known}")), None)
    if bare is not None and value != OTHER[bare]:
        return OTHER[bare]
    if isinstance(value, bool):
        return not value
    if isinstance(value, tuple):
        return tuple(0.9 * v for v in value)
    if isinstance(value, int):
        return value + 1
    if value is None:
        return 0.5
    assert isinstance(value, float), key
    return 0.9 * value if value else 0.1


UNSEEN = {"block_size"}
"""Of tensors larger than these; the fidelity tests vary it."""
KNOBS = [
    (name, key)
    for name in NAMES
    for key in steepest.describe(name).hyperparameters
    if key not in UNSEEN
]


@pytest.mark.parametrize(("name", "key"), KNOBS, ids=[f"{name}-{key}" for name, key in KNOBS])
def test_every_hyperparameter_changes_the_update(name: str, key: str) -> None:
    context = CONTEXT.get((name, key), {})
    default = context.get(key, steepest.describe(name).hyperparameters[key][0])
    if key.endswith("weight_decay"):
        default = 0.1
    before = plain(name, **context)
    value = SPECIAL.get((name, key)) or another_choice(name, key, default) or changed(key, default)
    after = trained(name, **{**context, key: value})
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


def bytes_of(expression: str, m: int, n: int, values: dict[str, Any]) -> int:
    allowed = {"min": min, "max": max, "abs": abs, "sum": sum, "ceil": lambda x: -(-x // 1)}
    return int(eval(expression, {"__builtins__": {}, **allowed, **values, "m": m, "n": n}))


@pytest.mark.parametrize("shape", [(256, 128), (96, 160), (64, 64), (300, 7)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_state_is_what_the_formula_says(name: str, shape: tuple[int, int]) -> None:
    recipe = catalogue.recipe(name)
    state = catalogue.initial_state(recipe.rule, torch.empty(shape, device="meta"))
    held = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    assert bytes_of(recipe.state, *shape, recipe.rule.hyperparameters()) == held


@pytest.mark.parametrize("name", NAMES)
def test_a_gradient_that_is_not_a_number_reaches_the_parameter(name: str) -> None:
    # So that the loss of the next step shows it, and nothing is kept in silence.
    made = groups(torch.float32)
    optimizer = steepest.create(name, made, compile=False)
    params = [p for group in made for p in group["params"]]
    for step, grads in enumerate(problems.stream(3, [tuple(p.shape) for p in params])):
        if step == 2:
            for g in grads:
                g.view(-1)[0] = torch.nan
        if optimizer.wants():
            problems.set_gradients(params, grads)
            optimizer.observe()
        problems.set_gradients(params, grads)
        optimizer.step()
    for p in params:
        assert p.isnan().any(), tuple(p.shape)
