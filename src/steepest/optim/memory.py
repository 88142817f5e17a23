"""What an optimizer holds for a model, counted on shapes alone: nothing is allocated."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from steepest.optim.catalogue import recipe
from steepest.optim.create import create
from steepest.optim.int8 import Int8Weight, int8_weights
from steepest.optim.roles import NamedRole, Role
from steepest.optim.roles import roles as find_roles


@dataclass(frozen=True)
class Held:
    """Bytes of the parameters of one role, their gradients and their optimizer state.

    Those of parameters in int8 are of their codes, scales and zeros.
    """

    role: str
    parameters: int
    """Number of scalars."""
    parameter_bytes: int
    gradient_bytes: int
    state_bytes: int


def held(
    optimizer: str,
    model: nn.Module,
    *,
    dtype: torch.dtype = torch.float32,
    state_dtype: torch.dtype | None = None,
    roles: Mapping[str, Role | str | NamedRole] | None = None,
    wrap: str | Sequence[str] = (),
    **hyperparameters: Any,
) -> list[Held]:
    """Return what a model's parameters, gradients and optimizer state take, role by role.

    `model` may be anywhere, also on the meta device; it stays as it is. `dtype` is that of
    parameters and gradients. Optimizers that keep weights in int8 are counted with the model's
    hidden matrices in it, as `int8_weights` stores them. State is in float32 as the engine keeps it
    (8-bit codes stay what they are), or counted as if its floating point tensors were in
    `state_dtype`, as they are in tables made with pure bfloat16. Step counts on the host are left
    out. Raises what `create` raises.
    """
    twins: dict[int, Any] = {id(t): torch.empty_like(t, device="meta") for t in model.buffers()}
    for p in model.parameters():
        shape = p.detach().to("meta") if _is_int8(p) else torch.empty_like(p, device="meta")
        twins[id(p)] = nn.Parameter(shape, p.requires_grad)
    model = copy.deepcopy(model, twins).to(dtype)  # the caller's stays as it is
    rule = recipe(optimizer).rule
    if rule.rounds_to_int8 and not wrap and not any(map(_is_int8, model.parameters())):
        group_size = hyperparameters.get("group_size", rule.hyperparameters()["group_size"])
        int8_weights(model, group_size=group_size, roles=roles)
    made = create(optimizer, model, roles=roles, wrap=wrap, compile=False, **hyperparameters)
    made.state_bytes()  # lays the state out
    named = find_roles(model, roles)
    rows = []
    for role in Role:
        mine = [p for name, p in model.named_parameters() if _has(named, name, role)]
        if not mine:
            continue
        count = sum(p.numel() for p in mine)
        state = [v for p in mine for v in made.state[p].values() if isinstance(v, Tensor)]
        rows.append(
            Held(
                role.value,
                count,
                sum(map(_stored_bytes, mine)),
                count * dtype.itemsize,
                sum(_bytes(tensor, state_dtype) for tensor in state),
            )
        )
    return rows


def _is_int8(parameter: Tensor) -> bool:
    return isinstance(parameter, Int8Weight)


def _stored_bytes(parameter: Tensor) -> int:
    if isinstance(parameter, Int8Weight):
        return parameter.stored_bytes()
    return parameter.numel() * parameter.element_size()


def _has(named: Mapping[str, NamedRole], name: str, role: Role) -> bool:
    return name in named and named[name].role is role


def _bytes(tensor: Tensor, state_dtype: torch.dtype | None) -> int:
    counted = state_dtype if state_dtype is not None and tensor.is_floating_point() else None
    return tensor.numel() * (tensor.dtype if counted is None else counted).itemsize
