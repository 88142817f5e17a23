"""Every optimizer by name: which rule for which role, where it comes from, what it keeps."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from steepest.errors import UserError, unknown
from steepest.optim.hyperparameters import MEANINGS
from steepest.optim.optimizer import Optimizer
from steepest.optim.roles import Role
from steepest.optim.roles import roles as find_roles
from steepest.optim.rule import Rule, Wrapper
from steepest.optim.rules.adam import AdamW
from steepest.optim.rules.factored import Adafactor
from steepest.optim.rules.kronecker import SOAP
from steepest.optim.rules.orthogonal import Muon
from steepest.optim.rules.sgd import SGD
from steepest.optim.rules.sign import Lion, Signum
from steepest.optim.rules.wrappers import Cautious

ALL_ROLES = frozenset(Role)
DECAYED = frozenset({Role.HIDDEN, Role.HEAD})
"""Roles that weight decay applies to unless asked otherwise."""


@dataclass(frozen=True)
class Recipe:
    """What a name of the catalogue means.

    `rule` steps the roles in `roles`; `fallback` steps the others, with its hyperparameters under
    an `adam_` prefix.
    """

    name: str
    rule: Rule
    family: str
    year: int
    paper: str
    roles: frozenset[Role] = ALL_ROLES
    fallback: Rule = field(default=AdamW())

    @property
    def routed(self) -> bool:
        """Whether some roles get the fallback rule."""
        return self.roles != ALL_ROLES

    def hyperparameters(self) -> dict[str, Any]:
        """Return every hyperparameter that `create` takes, with its default."""
        own = self.rule.hyperparameters()
        if not self.routed:
            return own
        return own | {f"adam_{k}": v for k, v in self.fallback.hyperparameters().items()}


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            "sgd", SGD(), "SGD and sign", 1964, "Polyak, heavy-ball momentum; SGDW arXiv:1711.05101"
        ),
        Recipe("signum", Signum(), "SGD and sign", 2018, "Bernstein et al., arXiv:1802.04434"),
        Recipe("lion", Lion(), "SGD and sign", 2023, "Chen et al., arXiv:2302.06675"),
        Recipe("adamw", AdamW(), "Adam", 2019, "Loshchilov & Hutter, arXiv:1711.05101"),
        Recipe("adafactor", Adafactor(), "light state", 2018, "Shazeer & Stern, arXiv:1804.04235"),
        Recipe(
            "muon",
            Muon(),
            "orthogonal",
            2024,
            "Jordan et al., https://kellerjordan.github.io/posts/muon",
            roles=frozenset({Role.HIDDEN}),
            fallback=AdamW(lr=3e-4, weight_decay=0.0, betas=(0.9, 0.95), eps=1e-10),
        ),
        Recipe("soap", SOAP(), "Kronecker", 2024, "Vyas et al., arXiv:2409.11321"),
    )
}

FALLBACK = "adamw"
"""Name, in `param_groups`, of the rule for the roles that the method does not step."""

WRAPPERS: dict[str, type[Wrapper]] = {"cautious": Cautious}


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
    """Roles the method itself steps; the others get the fallback rule (adam_...)."""
    state: dict[str, tuple[int, ...]]
    """State of a 256 x 128 float32 matrix that the method steps: name -> shape."""
    state_bytes_per_parameter: float
    """Bytes of state per parameter of that matrix."""


def names() -> list[str]:
    """Return the name of every optimizer, in the order of the catalogue."""
    return list(RECIPES)


def recipe(name: str) -> Recipe:
    """Return the recipe of a name. Raises UserError with the nearest name if there is none."""
    if name not in RECIPES:
        raise unknown("optimizer", name, RECIPES)
    return RECIPES[name]


def _own(rule: Rule) -> Recipe:
    return Recipe(type(rule).__name__.lower(), rule, "", 0, "")


def describe(name: str) -> Description:
    """Return what an optimizer is: source, formula, hyperparameters, state. Allocates nothing."""
    found = recipe(name)
    matrix = torch.empty(256, 128, device="meta")
    state = found.rule.init(matrix)
    held = sum(t.numel() * t.element_size() for t in state.values())
    meanings = {
        key: (default, MEANINGS[key] if key in MEANINGS else _of_fallback(key))
        for key, default in found.hyperparameters().items()
    }
    doc = type(found.rule).__doc__ or ""
    return Description(
        name=name,
        family=found.family,
        year=found.year,
        paper=found.paper,
        formula="\n".join(line.removeprefix("    ") for line in doc.strip().splitlines()),
        hyperparameters=meanings,
        roles=tuple(role.value for role in Role if role in found.roles),
        state={key: tuple(t.shape) for key, t in state.items()},
        state_bytes_per_parameter=held / matrix.numel(),
    )


def _of_fallback(key: str) -> str:
    return MEANINGS[key.removeprefix("adam_")] + " (AdamW, for the other roles)"


def create(
    name: str | Rule,
    model: nn.Module | Iterable[Any],
    *,
    wrap: str | Sequence[str] = (),
    decay_roles: Iterable[Role | str] = DECAYED,
    runs: int | None = None,
    compile: bool | Literal["auto"] = "auto",
    **hyperparameters: Any,
) -> Optimizer:
    """Return the optimizer `name`, or one that steps every parameter by a rule, for a model.

    `model` is an `nn.Module` (every parameter gets its role from its module, see `roles`), or
    parameters, or `(name, parameter)` pairs, or torch parameter groups, each with an optional
    `"role"`. Without roles, tensors of two and more dimensions count as hidden and others as
    vectors; optimizers that treat embeddings or heads differently then ask for roles.

    Parameter groups keep what they set; one without a role decays all of its parameters.

    `wrap` names wrappers around the rule, innermost first (`["cautious"]`). `decay_roles` are the
    roles that weight decay applies to: hidden and head unless asked. `runs` and `compile` are
    those of `Optimizer`. `hyperparameters` are those of `describe(name)`, the paper's by default.

    Raises UserError (a ValueError) for an unknown optimizer, wrapper or role, and TypeError for
    an unknown hyperparameter, each with the nearest right name.
    """
    found = recipe(name) if isinstance(name, str) else _own(name)
    valid = found.hyperparameters()
    name, rule = found.name, found.rule
    wrap = [wrap] if isinstance(wrap, str) else wrap
    for wrapper in wrap:
        if wrapper not in WRAPPERS:
            raise unknown("wrapper", wrapper, WRAPPERS)
        rule = WRAPPERS[wrapper](inner=rule)
        valid |= rule.hyperparameters()
    for given in hyperparameters:
        if given not in valid:
            raise TypeError(str(unknown(f"hyperparameter of {name}", given, valid)))
    own = {k: v for k, v in hyperparameters.items() if k in rule.hyperparameters()}
    adam = {k.removeprefix("adam_"): v for k, v in hyperparameters.items() if k not in own}
    decayed = {_role(role) for role in decay_roles}
    label = " ".join([*reversed(wrap), name])
    groups: dict[Hashable, dict[str, Any]] = {}
    for index, (params, role, extra) in enumerate(_members(model)):
        if found.routed and role is None:
            raise UserError(
                f"{name} treats embeddings, heads and hidden matrices differently, so it needs to "
                "know them: pass the nn.Module, or parameter groups with a 'role' each."
            )
        mine = role is None or role in found.roles
        group = {"rule": label if mine else FALLBACK, **(own if mine else adam)}
        if role is not None and role not in decayed:
            group["weight_decay"] = 0.0
        # A caller's own groups stay as they are; single parameters are gathered.
        key: Hashable = index if extra is not None else (mine, role is None or role in decayed)
        groups.setdefault(key, {**group, **(extra or {}), "params": []})["params"].extend(params)
    rules = {label: rule, FALLBACK: found.fallback} if found.routed else {label: rule}
    return Optimizer(list(groups.values()), rules, runs=runs, compile=compile)


def _members(
    model: nn.Module | Iterable[Any],
) -> Iterable[tuple[list[Any], Role | None, dict[str, Any] | None]]:
    """Yield parameters with their role, None where it is not known, and what their group sets.

    The last is None for parameters that did not come in a group.
    """
    if isinstance(model, nn.Module):
        parameters = dict(model.named_parameters())
        for name, named in find_roles(model).items():
            yield [(name, parameters[name])], named.role, None
        return
    for member in model:
        if isinstance(member, dict):
            params = member["params"]
            role = _role(member["role"]) if "role" in member else None
            extra = {k: v for k, v in member.items() if k not in ("params", "role")}
            yield [params] if isinstance(params, Tensor) else list(params), role, extra
        else:
            tensor = member[1] if isinstance(member, tuple) else member
            yield [member], Role.VECTOR if tensor.ndim < 2 else None, None


def _role(name: Role | str) -> Role:
    try:
        return Role(name)
    except ValueError:
        raise unknown("role", str(name), [role.value for role in Role]) from None
