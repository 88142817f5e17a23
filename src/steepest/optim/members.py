"""What an optimizer is made for: a model, parameters, or parameter groups."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from steepest.errors import UserError
from steepest.optim.roles import NamedRole, Role, as_role
from steepest.optim.roles import roles as find_roles

Member = tuple[list[Any], NamedRole | None, dict[str, Any] | None]
"""Parameters or (name, parameter) pairs, with their role, None where it is not known, and what
their group sets, None for parameters that did not come in a group."""


def members(
    model: nn.Module | Iterable[Any],
    roles: Mapping[str, Role | str | NamedRole] | None,
    runs: int | None,
) -> Iterator[Member]:
    """Yield the parameters of a model, or those that are given, one by one or group by group.

    Raises TypeError for what is neither a module nor an iterable of parameters, (name, parameter)
    pairs and groups, UserError for roles or runs that can't be those of its parameters.
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
    if isinstance(model, (Tensor, Mapping, str)) or not isinstance(model, Iterable):
        raise TypeError(
            "An optimizer is made for an nn.Module or a list of parameters, (name, parameter) "
            f"pairs or groups, not for a {type(model).__name__}; a single one goes in a list."
        )
    for member in model:
        yield _group(member) if isinstance(member, dict) else _single(member, runs)


def tensors(params: list[Any]) -> Iterator[tuple[str | None, Tensor]]:
    """Yield parameters with their names, None where they have none."""
    for p in params:
        yield p if isinstance(p, tuple) else (None, p)


def _single(member: Any, runs: int | None) -> Member:
    _check(member)
    ((_, tensor),) = tensors([member])
    return [member], NamedRole(Role.VECTOR) if tensor.ndim - (runs is not None) < 2 else None, None


def _group(group: dict[str, Any]) -> Member:
    if "params" not in group:
        raise TypeError(f"A parameter group has no 'params', but {', '.join(map(str, group))}.")
    params = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
    for member in params:
        _check(member)
    role = NamedRole(as_role(group["role"])) if "role" in group else None
    return params, role, {k: v for k, v in group.items() if k not in ("params", "role")}


def _check(member: Any) -> None:
    pair = isinstance(member, tuple) and len(member) == 2 and isinstance(member[0], str)
    if not isinstance(member[1] if pair else member, Tensor):
        raise TypeError(
            f"Among the parameters is a {type(member).__name__} that is neither a parameter nor a "
            "(name, parameter) pair."
        )
