"""Every optimizer by name: its recipe, and what there is to know about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from steepest.errors import unknown
from steepest.optim.hyperparameters import MEANINGS
from steepest.optim.recipe import Recipe
from steepest.optim.roles import Role
from steepest.optim.rule import Rule, Wrapper
from steepest.optim.rules import (
    adam,
    adam_by_tensor,
    adam_variants,
    adaptive,
    curvature,
    eight_bit,
    factored,
    grouping,
    hybrid,
    kronecker,
    light,
    lowrank,
    normalised,
    orthogonal,
    projected,
    psgd,
    sgd,
    shampoo,
    sign,
    spectral,
    tuning_free,
    variance_reduced,
)
from steepest.optim.rules.eight_bit import Quantised
from steepest.optim.rules.wrappers import (
    AdaptiveClipping,
    Cautious,
    GrowthLimiter,
    Kahan,
    Lookahead,
    StochasticRounding,
)

FAMILIES: tuple[tuple[Recipe, ...], ...] = (
    sgd.RECIPES,
    sign.RECIPES,
    adam.RECIPES,
    adaptive.RECIPES,
    adam_variants.RECIPES,
    adam_by_tensor.RECIPES,
    factored.RECIPES,
    light.RECIPES,
    eight_bit.RECIPES,
    orthogonal.RECIPES,
    spectral.RECIPES,
    normalised.RECIPES,
    kronecker.RECIPES,
    shampoo.RECIPES,
    psgd.RECIPES,
    hybrid.RECIPES,
    grouping.RECIPES,
    lowrank.RECIPES,
    projected.RECIPES,
    curvature.RECIPES,
    tuning_free.RECIPES,
    variance_reduced.RECIPES,
)
"""The recipes of each file of rules, in the order of the catalogue."""

RECIPES: dict[str, Recipe] = {recipe.name: recipe for family in FAMILIES for recipe in family}

WRAPPERS: dict[str, type[Wrapper]] = {
    wrapper.prefix: wrapper
    for wrapper in (
        Cautious,
        Lookahead,
        GrowthLimiter,
        AdaptiveClipping,
        Quantised,
        StochasticRounding,
        Kahan,
    )
}
"""What `create(wrap=...)` puts around a rule."""


@dataclass(frozen=True)
class Description:
    """What `steepest.describe` returns."""

    name: str
    family: str
    year: int
    paper: str
    formula: str
    hyperparameters: dict[str, tuple[Any, str]]
    """Name -> (default, meaning)."""
    roles: tuple[str, ...]
    """Roles the method itself steps; the others get the rules of its parts (adam_...)."""
    state: dict[str, tuple[int, ...]]
    """State of a 256 x 128 float32 matrix that the method steps: name -> shape."""
    state_bytes: str
    """Bytes of state of a float32 matrix of m rows and n columns, as an expression of m and n."""
    state_bytes_per_parameter: float
    """Bytes of state per parameter of a 256 x 128 matrix."""
    hooks: tuple[str, ...]
    """What the method needs beside gradients, a sentence each."""
    differs: tuple[str, ...]
    """Public implementations under this name that do something else, a sentence each."""


def names() -> list[str]:
    """Return the name of every optimizer, in the order of the catalogue."""
    return list(RECIPES)


def recipe(name: str) -> Recipe:
    """Return the recipe of a name. Raises UserError with the nearest name if there is none."""
    if name not in RECIPES:
        raise unknown("optimizer", name, RECIPES)
    return RECIPES[name]


def describe(name: str) -> Description:
    """Return what an optimizer is: source, formula, hyperparameters, state. Allocates nothing."""
    found = recipe(name)
    matrix = torch.empty(256, 128, device="meta")
    state = initial_state(found.rule, matrix)
    held = sum(t.numel() * t.element_size() for t in state.values())
    return Description(
        name=name,
        family=found.family,
        year=found.year,
        paper=found.paper,
        formula=_formula(found.rule),
        hyperparameters={
            key: (default, _meaning(found, key)) for key, default in found.hyperparameters().items()
        },
        roles=tuple(role.value for role in Role if found.part_of(role) is None),
        state={key: tuple(t.shape) for key, t in state.items()},
        state_bytes=found.state,
        state_bytes_per_parameter=held / matrix.numel(),
        hooks=hooks(found.rule),
        differs=found.differs,
    )


def initial_state(rule: Rule, param: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the state tensors of a parameter as the engine makes them."""
    key = {"key": torch.empty((), dtype=torch.int64, device=param.device)} if rule.draws else {}
    return {**rule.init(param), **key}


def hooks(rule: Rule) -> tuple[str, ...]:
    """Return what a rule needs beside the gradients of each step: a few words, and a sentence."""
    wanted = {extra for step in range(1, 50) if (extra := rule.wants(step)) is not None}
    found = [
        ("sampled_labels" in wanted, "sampled labels: a gradient on labels drawn from predictions"),
        ("previous_weights" in wanted, "second gradient: the batch's at the last step's weights"),
        (bool(rule.shared()), "global sums: over all parameters before each step"),
        (rule.averages, "evaluation weights: optimizer.eval() before evaluating, train() after"),
        (rule.keeps_gradient, "kept gradients: optimizer.zero_grad() leaves them, as its state"),
        (rule.starts(), "idle first step: it sets state up and moves nothing"),
        (rule.draws, "random numbers: a function of seed, parameter and step"),
    ]
    return tuple(sentence for needed, sentence in found if needed)


def _formula(rule: Rule) -> str:
    lines = (type(rule).__doc__ or "").strip().splitlines()
    text = "\n".join(line.removeprefix("    ") for line in lines)
    if isinstance(rule, Wrapper):
        text += "\n\nAround:\n\n" + _formula(rule.inner)
    return text


def _meaning(found: Recipe, key: str) -> str:
    if key in found.rule.hyperparameters():
        return MEANINGS[key]
    for part in found.parts:
        name = key.removeprefix(f"{part.prefix}_")
        if name in part.rule.hyperparameters() and name != key:
            whose = ", ".join(role.value for role in Role if role in part.roles)
            return f"{MEANINGS[name]} (for {whose})"
    raise KeyError(key)
