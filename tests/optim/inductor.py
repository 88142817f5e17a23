"""Optimizers compiled by inductor, C++ included, beside the same ones run eagerly.

What costs time is the number of C++ kernels, some 0.7 s each: so the parameters are as few and
small as show every kind of graph, and share a group, and the files have about equal work.
"""

from __future__ import annotations

import warnings
from typing import Any

import problems
import pytest
import torch
from engine import make, moved_alike
from torch import nn
from torch._inductor import config

import steepest
from steepest import compiler
from steepest.optim import catalogue, stepping

FILES: dict[str, tuple[str, ...]] = {
    "test_inductor_sign": ("SGD and sign", "tuning-free", "curvature", "variance reduced"),
    "test_inductor_adam": ("Adam",),
    "test_inductor_light": ("light state", "gradient grouping"),
    "test_inductor_orthogonal": ("orthogonal", "spectral"),
    "test_inductor_matrix": ("Kronecker", "hybrid", "normalised"),
    "test_inductor_low_rank": ("low rank",),
}
"""Which families of the catalogue a test file compiles."""

ROLES = {"one": "hidden", "other": "hidden", "table": "embedding", "gain": "vector"}
MATRIX = (6, 4)
# States of smaller matrices are not quantised.
LARGE = {
    "adam8bit": (64, 64),
    "lion8bit": (64, 64),
    "quantised": (64, 64),
    "galore_adamw8bit": (8, 520),
}
STEPS = 4
TOLERANCE = 1e-5


def names(file: str) -> list[str]:
    """Return the optimizers that a test file compiles."""
    return [r.name for r in catalogue.RECIPES.values() if r.family in FILES[file]]


def assert_compiled_is_eager(name: str, wrap: tuple[str, ...] = (), **options: Any) -> None:
    """Step an optimizer both ways, a refresh among the steps, and compare displacements."""
    if problem := compiler.problem():
        pytest.skip(problem)
    shape = next((LARGE[key] for key in (name, *wrap) if key in LARGE), MATRIX)
    compiled, eager, start = (model(shape) for _ in range(3))
    compile_kernels(name, compiled, wrap=wrap, **options)
    train(name, eager, compile=False, wrap=wrap, **options)
    both = zip(compiled.parameters(), eager.parameters(), start.parameters(), strict=True)
    for ours, theirs, before in both:
        assert not torch.equal(theirs, before)
        moved_alike(ours, theirs, before, TOLERANCE)


def compile_kernels(name: str, module: nn.Module, **options: Any) -> None:
    """Train compiled, and see that nothing fell back to eager steps."""
    stepping._warn_once.cache_clear()
    before = stepping._compiled.cache_info()
    with warnings.catch_warnings(), config.patch(compile_threads=1):
        warnings.filterwarnings("error", message=".*eagerly")
        optimizer = train(name, module, compile=True, **options)
    after = stepping._compiled.cache_info()
    used = after.hits + after.misses - before.hits - before.misses
    assert used >= len({group["rule"] for group in optimizer.param_groups})


def model(shape: tuple[int, ...]) -> nn.Module:
    """Return two matrices that make a stack, a table and a gain."""
    module = nn.Module()
    params = problems.parameters(shapes=(shape, shape, MATRIX, (5,)))
    for name, param in zip(ROLES, params, strict=True):
        module.register_parameter(name, param)
    return module


def train(name: str, module: nn.Module, **options: Any) -> steepest.Optimizer:
    """Step on fixed gradients; leave the evaluation weights in place where there are any."""
    decayed = tuple(set(ROLES.values()))
    optimizer = make(name, module, roles=ROLES, decay_roles=decayed, **options)
    params = list(module.parameters())
    for grads in problems.stream(STEPS, [tuple(p.shape) for p in params]):
        problems.set_gradients(params, grads)
        optimizer.step()
    optimizer.eval()
    return optimizer
