"""Optimizers as the engine's tests make, train and compare them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import problems
import torch
from torch import Tensor, nn

import steepest
from steepest.optim import catalogue

NAMES = steepest.names()
ELEMENTWISE = (
    "sgd",
    "signsgd",
    "signum",
    "lion",
    "adam",
    "adamw",
    "nadam",
    "nadamw",
    "adagrad",
    "adagrad_norm",
    "rmsprop",
    "radam",
    "adabelief",
    "laprop",
    "diffgrad",
    "adan",
    "adopt",
    "ademamix",
    "exadam",
    "sophia_g",
    "prodigy",
    "schedulefree_adamw",
    "schedulefree_sgd",
)
# A parameter's step depends on the gradients of the others.
SHARED = {name for name in NAMES if catalogue.recipe(name).rule.shared()}
# Weights are rounded at every step.
ROUNDED = {"q_apollo", "q_galore"}
# For a learning rate that is large for Scion.
SMALL_BALLS = {"scale": 1.0, "head_scale": 20.0}
# What makes 8 steps visit every code path: SOAP refreshes, everything decays.
OPTIONS: dict[str, dict[str, Any]] = {
    "rmsprop": {"momentum": 0.9},
    "prodigy": {"lr": 0.5, "d0": 1e-4, "growth_rate": 1.5},
    "sophia_g": {"update_interval": 3},
    "schedulefree_adamw": {"warmup_steps": 3},
    "schedulefree_sgd": {"warmup_steps": 3},
    "adamp": {"delta": 1.0},
    "ademamix": {"alpha_warmup": 6, "beta3_warmup": 5},
    "stable_spam": {"reset_interval": 3},
    "mars_adamw": {"adam_lr": 1e-2},
    "mars_lion": {"adam_lr": 1e-2},
    "mars_shampoo": {"adam_lr": 1e-2, "ns_dtype": "float32"},
    "soap": {"update_interval": 3},
    "shampoo": {"update_interval": 3, "eps": 1e-2},
    "kron": {"probability": (1.0, 0.3), "probability_decay": 0.2, "probability_start": 1},
    "cosmos": {"adam_lr": 1e-2, "rank": 2, "ns_dtype": "float32"},
    "sgg_adamw": {"recluster_interval": 3, "beta3": 0.5},
    "sgg_lamb": {"recluster_interval": 3, "beta3": 0.5},
    "sgg_shampoo": {"recluster_interval": 3, "beta3": 0.5, "update_interval": 4, "eps": 1e-2},
    "galore_adamw": {"update_interval": 3, "rank": 2},
    "galore_adafactor": {"update_interval": 3, "rank": 2},
    "galore_adamw8bit": {"update_interval": 3, "rank": 2},
    "fira": {"update_interval": 3, "rank": 2},
    "conda": {"update_interval": 3},
    "apollo": {"update_interval": 3, "rank": 2},
    "apollo_mini": {"update_interval": 3},
    "q_apollo": {"update_interval": 3, "rank": 2},
    "q_galore": {"update_interval": 1, "queue_size": 2, "rank": 2},
    "muon": {"adam_lr": 1e-2, "adam_weight_decay": 0.1, "ns_dtype": "float32"},
    "d_muon": {"ns_dtype": "float32"},
    "normuon": {"adam_lr": 1e-2, "ns_dtype": "float32"},
    "ortho_adam": {"ns_dtype": "float32"},
    "mudam": {"adam_lr": 1e-2},
    "dion": {"adam_lr": 1e-2, "rank": 2},
    "scion": {"ns_dtype": "float32", **SMALL_BALLS},
    "scion_light": {"ns_dtype": "float32", **SMALL_BALLS},
    "rmnp": {"adam_lr": 1e-2},
    "scale": {"adam_lr": 1e-2, "momentum": 0.9},
}
LR = 1e-2
# Factors of one gradient of less than full rank leave part of an eigenbasis to rounding, and the
# path of a method depends on it: such methods are compared on square matrices.
NEEDS_FULL_RANK = {"soap"}
FULL_RANK: tuple[tuple[int, ...], ...] = ((), (7,), (8, 8), (8, 8), (5, 5), (1, 1))


def shapes_of(name: str) -> tuple[tuple[int, ...], ...]:
    """Return every kind of shape on which an optimizer's path is determined."""
    return FULL_RANK if name in NEEDS_FULL_RANK else problems.SHAPES


def knob(name: str, key: str) -> tuple[str, set[str]]:
    """Return a hyperparameter's name in its rule, and the rules of the groups that it reaches."""
    recipe = catalogue.recipe(name)
    labels = {p: "adamw" if p.prefix == "adam" else f"{name} {p.prefix}" for p in recipe.parts}
    for part, label in labels.items():
        bare = key.removeprefix(f"{part.prefix}_")
        if key not in recipe.rule.hyperparameters() and bare != key:
            return bare, {label}
    found = recipe.hyperparameters()
    follow = (p for p in labels if p.follows and f"{p.prefix}_{key}" not in found)
    return key, {name, *(labels[p] for p in follow if key in p.rule.hyperparameters())}


def another_choice(name: str, key: str, value: Any) -> str | None:
    """Return another value that a hyperparameter may have, None where it is no choice of texts."""
    recipe, (plain, _) = catalogue.recipe(name), knob(name, key)
    for rule in (recipe.rule, *(part.rule for part in recipe.parts)):
        for choice in rule.choices(plain):
            if isinstance(value, str) and choice != value:
                return choice
    return None


def make(name: str, params: Sequence[Tensor] | nn.Module, **options: Any) -> steepest.Optimizer:
    given = {"lr": LR, "weight_decay": 0.1, "compile": False, **OPTIONS.get(name, {}), **options}
    members: Any = params if isinstance(params, nn.Module) else problems.with_roles(params)
    optimizer = steepest.create(name, members, **given)
    optimizer.register_step_pre_hook(sample)
    return optimizer


def sample(optimizer: Any, *_: Any) -> None:
    """Let an optimizer that wants a gradient on sampled labels have one: half of the batch's."""
    if not isinstance(optimizer, steepest.Optimizer) or ("sampled_labels" not in optimizer.wants()):
        return
    params = [p for group in optimizer.param_groups for p in group["params"]]
    held = [p.grad for p in params]
    for p, grad in zip(params, held, strict=True):
        p.grad = None if grad is None else 0.5 * grad
    optimizer.observe(batch_tokens=10)
    for p, grad in zip(params, held, strict=True):
        p.grad = grad


def train(
    optimizer: Any,
    params: Sequence[Tensor],
    steps: Iterable[int],
    shapes: Sequence[tuple[int, ...]] = problems.SHAPES,
) -> None:
    """Step on the gradients of the fixed stream that have these numbers."""
    wanted = list(steps)
    for step, grads in enumerate(problems.stream(max(wanted) + 1, shapes)):
        if step in wanted:
            problems.set_gradients(params, grads)
            sample(optimizer)  # a copy has lost the hook
            optimizer.step()


def trained(name: str, steps: int = 8, **options: Any) -> tuple[list[nn.Parameter], Any]:
    params = problems.parameters()
    optimizer = make(name, params, **options)
    train(optimizer, params, range(steps))
    return params, optimizer


def take_key(mine: Any, param: Tensor, theirs: Any, other: Tensor) -> None:
    """Give a parameter the random key that another has in its optimizer."""
    for optimizer in (mine, theirs):
        optimizer.state_bytes()  # lays the state out
    if "key" in mine.state[param]:
        mine.state[param]["key"].copy_(theirs.state[other]["key"])


def assert_same_bits(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def moved_alike(a: Tensor, b: Tensor, start: Tensor, tolerance: float = 1e-6) -> None:
    """Compare displacements, up to the rounding of the parameter itself."""
    floor = 4 * torch.finfo(b.dtype).eps * b.norm()
    assert (a - b).norm() <= tolerance * (b - start).norm() + floor
