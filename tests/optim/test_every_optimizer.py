"""What holds for every optimizer of the catalogue."""

from __future__ import annotations

from typing import Any

import problems
import pytest
import torch

import steepest
from steepest.optim import catalogue

NAMES = steepest.names()
SHAPES = {
    "hidden": ((8, 8), (12, 5), (5, 12)),
    "embedding": ((20, 8),),
    "head": ((20, 8),),
    "vector": ((7,), ()),
}


def groups(dtype: torch.dtype = torch.float64) -> list[dict[str, Any]]:
    """Return seeded parameters of every role."""
    flat = iter(problems.parameters(dtype, [s for shapes in SHAPES.values() for s in shapes]))
    return [
        {"params": [next(flat) for _ in shapes], "role": role} for role, shapes in SHAPES.items()
    ]


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
