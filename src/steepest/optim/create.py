"""From a name, a model and hyperparameters to an optimizer."""

from __future__ import annotations

import re
import warnings
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, Literal

from torch import nn

from steepest.errors import UserError, unknown
from steepest.optim.catalogue import WRAPPERS, recipe
from steepest.optim.groups import RESERVED
from steepest.optim.members import members, tensors
from steepest.optim.optimizer import Optimizer
from steepest.optim.presets import preset as find_preset
from steepest.optim.recipe import Part, Recipe
from steepest.optim.roles import NamedRole, Role, as_role
from steepest.optim.rule import Rule

DECAYED = frozenset({Role.HIDDEN, Role.HEAD})
"""Roles that weight decay applies to unless asked otherwise."""


def create(
    name: str | Rule,
    model: nn.Module | Iterable[Any],
    *,
    preset: str | None = None,
    wrap: str | Sequence[str] | None = None,
    roles: Mapping[str, Role | str | NamedRole] | None = None,
    decay_roles: Iterable[Role | str] = DECAYED,
    runs: int | None = None,
    compile: bool | Literal["auto"] = "auto",
    seed: int = 0,
    nonfinite: Literal["propagate", "skip", "raise"] = "propagate",
    **hyperparameters: Any,
) -> Optimizer:
    """Return the optimizer `name`, or one that steps every parameter by a rule, for a model.

    `model` is an `nn.Module` (every parameter gets its role from its module, see `roles`), or
    parameters, or `(name, parameter)` pairs, or torch parameter groups, each with an optional
    `"role"`. Without roles, tensors of two and more dimensions count as hidden and others as
    vectors; optimizers that treat embeddings or heads differently then ask for roles.

    Parameter groups keep what they set, by the names of `hyperparameters` or, of what AdamW steps
    beside the method, by AdamW's own; one without a role decays all of its parameters.

    `preset` names tuned hyperparameters (`steepest optimizers NAME` lists them); what is given
    beside it wins, `wrap` included. `wrap` names wrappers, innermost first (`["cautious"]`): around
    the method's own rule, and those that average or store weights around every role's. `roles`
    overrides the roles of parameters by name or pattern. `decay_roles` are the roles that weight
    decay applies to: hidden and head unless asked. `runs`, `compile`, `seed` and `nonfinite` are
    those of `Optimizer`. `hyperparameters` are those of `describe(name)`, the paper's by default.

    Raises UserError (a ValueError) for an unknown optimizer, preset, wrapper or role, and TypeError
    for an unknown hyperparameter, each with the nearest right name, and for what is not a module,
    nor an iterable of the above. Warns where a parameter's role is in doubt and matters.
    """
    found = recipe(name) if isinstance(name, str) else _own(name)
    if preset is not None:
        tuned = find_preset(found.name, preset)
        hyperparameters = {**tuned.hyperparameters, **hyperparameters}
        wrap = tuned.wrap if wrap is None else wrap
    wrap = [wrap] if isinstance(wrap, str) else list(wrap or ())
    rule, label = _wrapped(found, wrap)
    rules = {label: rule} | {_label(found, p): _around(p.rule, wrap) for p in found.parts}
    _check_names(found, rule, hyperparameters)
    decayed = {as_role(role) for role in decay_roles}
    groups: dict[Hashable, dict[str, Any]] = {}
    doubts: dict[tuple[str, str], list[str]] = {}
    for index, (params, named, extra) in enumerate(members(model, roles, runs)):
        part = _part(found, named, extra or {})
        group = {"rule": label, **_given(rule, hyperparameters)}
        if part is not None:
            group = _group_of_part(found, part, rules[_label(found, part)], hyperparameters)
        if named is not None:
            if named.doubt and (found.routed or (part is None and rule.splits)):
                for path, _ in params:
                    sentence = f"is stepped as {named.role.value}, but {named.doubt}"
                    doubts.setdefault((re.sub(r"\d+", "*", path), sentence), []).append(path)
            group |= _layout(named, rule if part is None else part.rule)
            if part is None and found.adapt is not None:
                for _, tensor in tensors(params):
                    adapted = found.adapt(named, tensor)
                    group |= {k: v for k, v in adapted.items() if _is_default(rule, group, k)}
            if named.role not in decayed:
                group["weight_decay"] = 0.0
        # A caller's own groups stay as they are; single parameters are gathered.
        decays = named is None or named.role in decayed
        alike = (decays, *sorted(map(repr, group.items())))
        key: Hashable = index if extra is not None else alike
        group |= {} if extra is None else _of_group(extra, found, part, rules[group["rule"]])
        groups.setdefault(key, {**group, "params": []})["params"].extend(params)
    _warn_of(doubts)
    return Optimizer(
        list(groups.values()), rules, runs=runs, compile=compile, seed=seed, nonfinite=nonfinite
    )


def _own(rule: Rule) -> Recipe:
    return Recipe(type(rule).__name__.lower(), rule, "", 0, "", "")


def _wrapped(found: Recipe, wrap: Sequence[str]) -> tuple[Rule, str]:
    rule = found.rule
    for wrapper in wrap:
        if wrapper not in WRAPPERS:
            raise unknown("wrapper", wrapper, WRAPPERS)
        rule = WRAPPERS[wrapper](inner=rule)
    return rule, " ".join([*reversed(wrap), found.name])


def _around(rule: Rule, wrap: Sequence[str]) -> Rule:
    """Return the rule of a part with the wrappers that go around the rules of all roles."""
    for wrapper in wrap:
        rule = WRAPPERS[wrapper](inner=rule) if WRAPPERS[wrapper].everywhere else rule
    return rule


def _check_names(found: Recipe, rule: Rule, given: Mapping[str, Any]) -> None:
    valid = found.hyperparameters() | rule.hyperparameters()
    for part in found.parts:
        valid |= {f"{part.prefix}_{name}": 0 for name in part.rule.hyperparameters()}
    for name in given:
        if name not in valid:
            raise TypeError(str(unknown(f"hyperparameter of {found.name}", name, valid)))


def _part(found: Recipe, named: NamedRole | None, group: Mapping[str, Any]) -> Part | None:
    """Return the part of a recipe that steps a role, unless the group names its rule."""
    if "rule" in group:
        return next((p for p in found.parts if _label(found, p) == group["rule"]), None)
    if found.routed and named is None:
        raise UserError(
            f"{found.name} treats embeddings, heads and hidden matrices differently, so it "
            "needs to know them: pass the nn.Module, or parameter groups with a 'role' each."
        )
    return found.part_of(None if named is None else named.role)


def _of_group(
    given: Mapping[str, Any], found: Recipe, part: Part | None, rule: Rule
) -> dict[str, Any]:
    """Return what a caller's group sets, by the names of the rule that steps it.

    Hyperparameters may have the names that `create` takes, too. Raises TypeError for others.
    """
    names = {name: name for name in (*RESERVED, *rule.hyperparameters())}
    if part is not None:
        names |= {f"{part.prefix}_{name}": name for name in part.rule.hyperparameters()}
    for key in given:
        if key not in names:
            kind = f"hyperparameter of what {_label(found, part) if part else found.name} steps"
            raise TypeError(str(unknown(kind, key, names.keys() - RESERVED)))
    bare = {key: value for key, value in given.items() if names[key] == key}
    return bare | {names[key]: value for key, value in given.items() if names[key] != key}


def _is_default(rule: Rule, given: Mapping[str, Any], name: str) -> bool:
    default = rule.hyperparameters()[name]
    return bool(given.get(name, default) == default)


def _given(rule: Rule, values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in values.items() if k in rule.hyperparameters()}


def _group_of_part(
    found: Recipe, part: Part, wrapped: Rule, values: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what a part's group sets: its own hyperparameters, and those of its wrappers."""
    inner = part.rule.hyperparameters()
    around = {k: v for k, v in _given(wrapped, values).items() if k not in inner}
    return {"rule": _label(found, part), **around, **part.given(found.rule, values)}


def _label(found: Recipe, part: Part) -> str:
    """Return the name of a part's rule in `param_groups`."""
    return "adamw" if part.prefix == "adam" else f"{found.name} {part.prefix}"


def _layout(named: NamedRole, rule: Rule) -> dict[str, Any]:
    """Return how a parameter's values lie in its tensor, where the rule cares."""
    if rule.elementwise:
        return {}
    seen: dict[str, Any] = {"transposed": named.transposed, "bank": named.bank}
    if rule.splits:
        seen["split"] = named.split
    return {name: value for name, value in seen.items() if value}


def _warn_of(doubts: Mapping[tuple[str, str], list[str]]) -> None:
    """Warn of each doubt once for the parameters whose names differ in numbers alone."""
    for (_, sentence), names in doubts.items():
        parts = zip(*(name.split(".") for name in names), strict=True)
        pattern = ".".join(part[0] if len(set(part)) == 1 else "*" for part in parts)
        warnings.warn(
            f"{pattern} {sentence}. Say what it is with create(..., roles={{{pattern!r}: ...}}).",
            stacklevel=3,
        )
