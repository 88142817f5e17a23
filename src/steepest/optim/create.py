"""From a name, a model and hyperparameters to an optimizer."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn

from steepest.errors import UserError, unknown
from steepest.optim.catalogue import WRAPPERS, recipe
from steepest.optim.optimizer import Optimizer
from steepest.optim.presets import preset as find_preset
from steepest.optim.recipe import Part, Recipe
from steepest.optim.roles import NamedRole, Role, as_role
from steepest.optim.roles import roles as find_roles
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

    Parameter groups keep what they set; one without a role decays all of its parameters.

    `preset` names tuned hyperparameters (`steepest optimizers NAME` lists them); what is given
    beside it wins, `wrap` included. `wrap` names wrappers, innermost first (`["cautious"]`): around
    the method's own rule, and those that average or store weights around every role's. `roles`
    overrides the roles of parameters by name or pattern. `decay_roles` are the roles that weight
    decay applies to: hidden and head unless asked. `runs`, `compile`, `seed` and `nonfinite` are
    those of `Optimizer`. `hyperparameters` are those of `describe(name)`, the paper's by default.

    Raises UserError (a ValueError) for an unknown optimizer, preset, wrapper or role, and TypeError
    for an unknown hyperparameter, each with the nearest right name. Warns where a parameter's role
    is in doubt and matters.
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
    for index, (params, named, extra) in enumerate(_members(model, roles, runs)):
        part = found.part_of(None if named is None else named.role)
        if found.routed and named is None:
            raise UserError(
                f"{found.name} treats embeddings, heads and hidden matrices differently, so it "
                "needs to know them: pass the nn.Module, or parameter groups with a 'role' each."
            )
        group = {"rule": label, **_given(rule, hyperparameters)}
        if part is not None:
            group = _group_of_part(found, part, rules[_label(found, part)], hyperparameters)
        if named is not None:
            _warn_of_doubt(found, part, params, named, rule)
            group |= _layout(named, rule if part is None else part.rule)
            if part is None and found.adapt is not None:
                for _, tensor in _tensors(params):
                    adapted = found.adapt(named, tensor)
                    group |= {k: v for k, v in adapted.items() if _is_default(rule, group, k)}
            if named.role not in decayed:
                group["weight_decay"] = 0.0
        # A caller's own groups stay as they are; single parameters are gathered.
        decays = named is None or named.role in decayed
        own = (decays, *sorted(map(repr, group.items())))
        key: Hashable = index if extra is not None else own
        groups.setdefault(key, {**group, **(extra or {}), "params": []})["params"].extend(params)
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


def _warn_of_doubt(
    found: Recipe, part: Part | None, params: list[Any], named: NamedRole, rule: Rule
) -> None:
    if named.doubt and (found.routed or (part is None and rule.splits)):
        name = next((name for name, _ in _tensors(params)), None) or "A parameter"
        warnings.warn(
            f"{name} is stepped as {named.role.value}, but {named.doubt}. Say what it is with "
            f"create(..., roles={{{name!r}: ...}}).",
            stacklevel=3,
        )


def _tensors(params: list[Any]) -> Iterator[tuple[str | None, Tensor]]:
    for p in params:
        yield p if isinstance(p, tuple) else (None, p)


def _members(
    model: nn.Module | Iterable[Any],
    roles: Mapping[str, Role | str | NamedRole] | None,
    runs: int | None,
) -> Iterable[tuple[list[Any], NamedRole | None, dict[str, Any] | None]]:
    """Yield parameters with their role, None where it is not known, and what their group sets.

    The last is None for parameters that did not come in a group.
    """
    if isinstance(model, nn.Module):
        parameters = dict(model.named_parameters())
        if runs is not None:
            raise UserError(
                "With runs the leading dimension of every parameter counts runs, which a module's "
                "layers do not say; pass parameter groups with a 'role' each."
            )
        for name, named in find_roles(model, roles).items():
            yield [(name, parameters[name])], named, None
        return
    if roles:
        raise UserError("roles name parameters of an nn.Module; give groups their 'role' instead.")
    for member in model:
        if isinstance(member, dict):
            params = member["params"]
            group_role = NamedRole(as_role(member["role"])) if "role" in member else None
            extra = {k: v for k, v in member.items() if k not in ("params", "role")}
            yield [params] if isinstance(params, Tensor) else list(params), group_role, extra
        else:
            tensor = member[1] if isinstance(member, tuple) else member
            yield (
                [member],
                NamedRole(Role.VECTOR) if tensor.ndim - (runs is not None) < 2 else None,
                None,
            )
