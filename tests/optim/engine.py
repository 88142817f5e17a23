"""Optimizers as the engine's tests make, train and compare them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import problems
import torch
from torch import Tensor, nn

import steepest

NAMES = steepest.names()
ELEMENTWISE = ("sgd", "signum", "lion", "adamw")
# What makes 8 steps visit every code path: SOAP refreshes, everything decays.
OPTIONS: dict[str, dict[str, Any]] = {
    "soap": {"update_interval": 3},
    "muon": {"adam_lr": 1e-2, "adam_weight_decay": 0.1, "ns_dtype": "float32"},
}
LR = 1e-2
# Factors of one gradient of less than full rank leave part of an eigenbasis to rounding, and the
# path of a method depends on it: such methods are compared on square matrices.
NEEDS_FULL_RANK = {"soap"}
FULL_RANK: tuple[tuple[int, ...], ...] = ((), (7,), (8, 8), (8, 8), (5, 5), (1, 1))


def shapes_of(name: str) -> tuple[tuple[int, ...], ...]:
    """Return every kind of shape on which an optimizer's path is determined."""
    return FULL_RANK if name in NEEDS_FULL_RANK else problems.SHAPES


def make(name: str, params: Sequence[Tensor] | nn.Module, **options: Any) -> steepest.Optimizer:
    given = {"lr": LR, "weight_decay": 0.1, "compile": False, **OPTIONS.get(name, {}), **options}
    members: Any = params if isinstance(params, nn.Module) else problems.with_roles(params)
    return steepest.create(name, members, **given)


def train(
    optimizer: torch.optim.Optimizer,
    params: Sequence[Tensor],
    steps: Iterable[int],
    shapes: Sequence[tuple[int, ...]] = problems.SHAPES,
) -> None:
    """Step on the gradients of the fixed stream that have these numbers."""
    wanted = list(steps)
    for step, grads in enumerate(problems.stream(max(wanted) + 1, shapes)):
        if step in wanted:
            problems.set_gradients(params, grads)
            optimizer.step()


def trained(name: str, steps: int = 8, **options: Any) -> tuple[list[nn.Parameter], Any]:
    params = problems.parameters()
    optimizer = make(name, params, **options)
    train(optimizer, params, range(steps))
    return params, optimizer


def assert_same_bits(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def moved_alike(a: Tensor, b: Tensor, start: Tensor, tolerance: float = 1e-6) -> None:
    """Compare displacements, up to the rounding of the parameter itself."""
    floor = 4 * torch.finfo(b.dtype).eps * b.norm()
    assert (a - b).norm() <= tolerance * (b - start).norm() + floor
