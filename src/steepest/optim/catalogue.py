"""Every optimizer by name: its recipe, and what there is to know about it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from steepest.errors import unknown
from steepest.optim.hyperparameters import MEANINGS
from steepest.optim.recipe import Recipe
from steepest.optim.roles import Role
from steepest.optim.rule import Rule
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
from steepest.optim.wrapper import Wrapper

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


@dataclass(frozen=True)
class WrapperDescription:
    """What `describe_wrapper` returns."""

    name: str
    formula: str
    hyperparameters: dict[str, tuple[Any, str]]
    """Own ones: name -> (default, meaning). Around a rule that has the name, <wrapper>_<name>."""
    everywhere: bool
    """It goes around the rules of all roles, not around the method's own alone."""


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


def describe_wrapper(name: str) -> WrapperDescription:
    """Return what a wrapper is. Raises UserError with the nearest name if there is none."""
    if name not in WRAPPERS:
        raise unknown("wrapper", name, WRAPPERS)
    wrapper = WRAPPERS[name]
    own = [field for field in dataclasses.fields(wrapper) if field.name not in Wrapper.INHERITED]
    return WrapperDescription(
        name,
        _docstring(wrapper),
        {field.name: (field.default, _meaning_around(wrapper, field.name)) for field in own},
        wrapper.everywhere,
    )


def initial_state(rule: Rule, param: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the state tensors of a parameter as the engine makes them."""
    key = {"key": torch.empty((), dtype=torch.int64, device=param.device)} if rule.draws else {}
    return {**rule.init(param), **key}


def hooks(rule: Rule) -> tuple[str, ...]:
    """Return what a rule needs beside the gradients of each step: a few words, and a sentence."""
    extra = rule.extra()
    found = [
        (extra == "sampled_labels", "sampled labels: a gradient on labels drawn from predictions"),
        (extra == "previous_weights", "second gradient: the batch's at the last step's weights"),
        (bool(rule.shared()), "global sums: over all parameters before each step"),
        (rule.averages, "evaluation weights: optimizer.eval() before evaluating, train() after"),
        (rule.keeps_gradient, "kept gradients: what a step leaves in .grad is its state"),
        (rule.starts(), "idle first step: it sets state up and moves nothing"),
        (rule.draws, "random numbers: a function of seed, parameter and step"),
        (bool(rule.total_steps), f"total steps: {', '.join(sorted(rule.total_steps))}"),
    ]
    return tuple(sentence for needed, sentence in found if needed)


def _formula(rule: Rule) -> str:
    text = _docstring(type(rule))
    if isinstance(rule, Wrapper):
        text += "\n\nAround:\n\n" + _formula(rule.inner)
    return text


def _docstring(cls: type[Rule]) -> str:
    lines = (cls.__doc__ or "").strip().splitlines()
    return "\n".join(line.removeprefix("    ") for line in lines)


def _meaning(found: Recipe, key: str) -> str:
    if key in found.rule.hyperparameters():
        return _meaning_in(found.rule, key)
    for part in found.parts:
        name = key.removeprefix(f"{part.prefix}_")
        if name in part.rule.hyperparameters() and name != key:
            whose = ", ".join(role.value for role in Role if role in part.roles)
            return f"{_meaning_in(part.rule, name)} (for {whose})"
    raise KeyError(key)


def _meaning_in(rule: Rule, key: str) -> str:
    while isinstance(rule, Wrapper):
        if field := rule.own_names().get(key):
            return _meaning_around(type(rule), field)
        rule = rule.inner
    return MEANINGS[key]


def _meaning_around(wrapper: type[Wrapper], field: str) -> str:
    """Return what a wrapper's own hyperparameter means, where that is not what its name says."""
    return MEANINGS.get(f"{wrapper.prefix}_{field}") or MEANINGS[field]
