"""Weights stored as int8 codes: tensors that read as floats, and a model's matrices made of them.

No float copy is kept: an operation that reads a weight dequantises it, forward and backward anew.
The weights change by a rule that rounds up or down at random (`Rule.rounds_to_int8`), or by
`copy_`; what else would write to them raises, since rounding to nearest loses small steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_any, tree_map_only

from steepest.errors import UserError
from steepest.optim.grid import Grid, from_grid, on_grid_of, to_grid
from steepest.optim.roles import NamedRole, Role
from steepest.optim.roles import roles as find_roles
from steepest.optim.rule import Rule, compute_dtype

aten = torch.ops.aten
FACTORIES = frozenset(
    {
        aten.empty_like.default,
        aten.full_like.default,
        aten.new_empty.default,
        aten.new_full.default,
        aten.new_ones.default,
        aten.new_zeros.default,
        aten.ones_like.default,
        aten.rand_like.default,
        aten.randn_like.default,
        aten.zeros_like.default,
    }
)
"""Operations that read of a tensor no values."""


class Int8Weight(Tensor):
    """A tensor of 8-bit codes and a scale and a zero per group, which reads as a float tensor.

    `grid` holds codes of what the optimizer sees, in groups of `group_size` row by row (see
    `steepest.optim.grid`): 1 + 5 / group_size bytes per weight. `dtype` is the one that the tensor
    declares: gradients have it, and values are cast to it when read. `transposed`: the tensor is
    the transpose of what the codes are of.

    `detach`, `clone`, `to`, `t`, one matrix of a stack, and copies keep the codes; every other
    operation gives plain tensors. `to(dtype)` changes what is declared, and `dequantize()` returns
    a plain tensor. `copy_` from another one copies its codes; from floats it rounds to nearest, but
    leaves a group alone whose values are on its grid. `torch.save` and
    `torch.load(weights_only=True)` keep the codes; a model of plain parameters takes the state_dict
    of one of these, and the other way round.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    group_size: int
    transposed: bool

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls: type[Self],
        grid: Grid,
        group_size: int,
        dtype: torch.dtype,
        *,
        transposed: bool = False,
        strides: Sequence[int] | None = None,
    ) -> Self:
        """Return a tensor of these codes, no copy; `strides` are those of its gradients."""
        shape = (grid.codes.mT if transposed else grid.codes).shape
        made: Self = torch.Tensor._make_wrapper_subclass(
            cls, shape, strides=strides, dtype=dtype, device=grid.codes.device
        )
        return made

    def __init__(
        self,
        grid: Grid,
        group_size: int,
        dtype: torch.dtype,
        *,
        transposed: bool = False,
        strides: Sequence[int] | None = None,
    ) -> None:
        self.codes, self.scale, self.zero = grid
        self.group_size, self.transposed = group_size, transposed

    @property
    def grid(self) -> Grid:
        """Codes, scales and zeros, no copy."""
        return Grid(self.codes, self.scale, self.zero)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the values as a plain tensor without gradient, in the declared dtype or another.

        In float32 they are exact; a declared bfloat16 rounds them.
        """
        values = from_grid(self.grid, self.group_size).to(dtype or self.dtype)
        return values.mT if self.transposed else values

    def stored_bytes(self) -> int:
        """Return the bytes of codes, scales and zeros."""
        return sum(part.numel() * part.element_size() for part in self.grid)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Int8Weight({self.dequantize()}, group_size={self.group_size})"

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["codes", "scale", "zero"], (self.group_size, self.dtype, self.transposed)

    @classmethod
    def __tensor_unflatten__(
        cls, parts: dict[str, Tensor], made: Any, outer_size: Any, outer_stride: Any
    ) -> Int8Weight:
        group_size, dtype, transposed = made
        grid = Grid(**parts)
        return cls(grid, group_size, dtype, transposed=transposed, strides=outer_stride)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if (keep := KEEPING.get(func)) is not None:
            result = keep(*args, **kwargs)
            if result is not NotImplemented:
                return result
        if func in FACTORIES:
            args, kwargs = tree_map_only(Int8Weight, _unread, (args, kwargs))
        elif written := _written(func, args, kwargs):
            raise UserError(
                f"{written} writes to int8 weights in place, which would round to nearest and lose "
                "small steps. They are stepped by q_apollo and q_galore, and set by copy_."
            )
        args, kwargs = tree_map_only(Int8Weight, Int8Weight.dequantize, (args, kwargs))
        return func(*args, **kwargs)


def _unread(weight: Int8Weight) -> Tensor:
    shape, strides = weight.shape, weight.stride()
    return torch.empty_strided(shape, strides, dtype=weight.dtype, device=weight.device)


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Return the operation's name if it writes to an int8 weight."""
    if not func._schema.is_mutable:
        return ""
    arguments = func._schema.arguments
    given = dict(zip((a.name for a in arguments), args, strict=False)) | kwargs
    targets = [given.get(a.name) for a in arguments if a.alias_info and a.alias_info.is_write]
    found = tree_any(lambda value: isinstance(value, Int8Weight), targets)
    return str(func._schema.name).removeprefix("aten::") if found else ""


def _same(weight: Int8Weight) -> Int8Weight:
    return _changed(weight)


def _changed(
    weight: Int8Weight,
    change: Callable[[Tensor], Tensor] = lambda part: part,
    dtype: torch.dtype | None = None,
) -> Int8Weight:
    """Return a weight with other codes, scales and zeros, and perhaps another declared dtype."""
    return Int8Weight(
        Grid(*map(change, weight.grid)),
        weight.group_size,
        dtype or weight.dtype,
        transposed=weight.transposed,
        strides=weight.stride(),
    )


def _clone(weight: Int8Weight, *, memory_format: Any = torch.preserve_format) -> Any:
    if memory_format is not torch.preserve_format and not weight.is_contiguous():
        return NotImplemented
    return _changed(weight, torch.clone)


def _t(weight: Int8Weight) -> Int8Weight:
    *outer, rows, columns = weight.stride()
    return Int8Weight(
        weight.grid,
        weight.group_size,
        weight.dtype,
        transposed=not weight.transposed,
        strides=(*outer, columns, rows),
    )


def _transpose(weight: Int8Weight, first: int, second: int) -> Any:
    sides = {weight.ndim - 2, weight.ndim - 1}
    return _t(weight) if {d % weight.ndim for d in (first, second)} == sides else NotImplemented


def _permute(weight: Int8Weight, dims: Sequence[int]) -> Any:
    turned = [*range(weight.ndim - 2), weight.ndim - 1, weight.ndim - 2]
    return _t(weight) if [d % weight.ndim for d in dims] == turned else NotImplemented


def _select(weight: Int8Weight, dim: int, index: int) -> Any:
    """Return a matrix of a stack, if no group is in two of them."""
    if weight.ndim != 3 or dim % 3 != 0 or weight.codes[0].numel() % weight.group_size:
        return NotImplemented
    scale, zero = (part.view(len(weight), -1)[index] for part in (weight.scale, weight.zero))
    return Int8Weight(
        Grid(weight.codes[index], scale, zero),
        weight.group_size,
        weight.dtype,
        transposed=weight.transposed,
        strides=weight.stride()[1:],
    )


def _to_copy(weight: Int8Weight, **to: Any) -> Any:
    dtype, device = to.get("dtype") or weight.dtype, to.get("device") or weight.device
    if not dtype.is_floating_point:
        return NotImplemented

    def moved(part: Tensor) -> Tensor:
        kind = compute_dtype(dtype) if part.is_floating_point() else part.dtype
        return part.to(device, kind, non_blocking=to.get("non_blocking", False), copy=True)

    return _changed(weight, moved, dtype)


def _copy(target: Tensor, source: Tensor, non_blocking: bool = False) -> Any:
    """Set codes: those of the source where they mean the same, else the nearest."""
    if not isinstance(target, Int8Weight):
        return NotImplemented
    if isinstance(source, Int8Weight):
        like = (target.shape, target.group_size, target.transposed)
        if (source.shape, source.group_size, source.transposed) == like:
            for mine, theirs in zip(target.grid, source.grid, strict=True):
                mine.copy_(theirs, non_blocking)
            return target
        source = source.dequantize(source.scale.dtype)
    values = source.to(target.device).expand(target.shape)
    new = on_grid_of(values.mT if target.transposed else values, target.grid, target.group_size)
    for mine, theirs in zip(target.grid, new, strict=True):
        mine.copy_(theirs)
    return target


KEEPING: dict[Any, Callable[..., Any]] = {
    aten.alias.default: _same,
    aten.clone.default: _clone,
    aten.copy_.default: _copy,
    aten.detach.default: _same,
    aten.permute.default: _permute,
    aten.select.int: _select,
    aten.t.default: _t,
    aten.transpose.int: _transpose,
    aten._to_copy.default: _to_copy,
}
"""Operations that keep codes, or leave it (NotImplemented) to the one on plain values."""

torch.serialization.add_safe_globals([Int8Weight, Grid])


def int8_weights(
    model: nn.Module,
    *,
    group_size: int = 256,
    roles: Mapping[str, Role | str | NamedRole] | None = None,
) -> nn.Module:
    """Store the hidden matrices of a model in int8, in place, rounded to nearest; return the model.

    Call it before making the optimizer, `steepest.create("q_galore", model)` or `"q_apollo"`, whose
    `group_size` then is this one unless given. The parameters become new `Int8Weight` parameters of
    the same dtype: 1 byte per weight and 5 per group of `group_size` weights. Forward and backward
    passes compute what they would with the rounded float weights, which they make anew, one weight
    at a time; gradients are plain tensors of that dtype.

    `roles` overrides roles by name or pattern, as in `create`. Under `DistributedDataParallel` make
    the same weights in every process; FSDP makes float shards of them. Raises UserError where
    nothing is hidden, where a weight is sharded or stored so already, and where groups do not
    divide the matrices of a stack of experts.
    """
    if group_size < 1:
        raise UserError(f"group_size is {group_size}; a group has at least 1 weight.")
    named = {n: r for n, r in find_roles(model, roles).items() if r.role is Role.HIDDEN}
    if not named:
        raise UserError("int8_weights found no hidden matrix in the model that needs a gradient.")
    parameters = dict(model.named_parameters())
    stored = {
        parameters[name]: _stored(name, parameters[name], role, group_size)
        for name, role in named.items()
    }
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter in stored:
                setattr(module, name, stored[parameter])
    return model


def _stored(name: str, parameter: nn.Parameter, role: NamedRole, group_size: int) -> nn.Parameter:
    """Return a parameter in int8, the codes laid out as an optimizer sees it."""
    if isinstance(parameter, (DTensor, Int8Weight)):
        kind = "sharded" if isinstance(parameter, DTensor) else "stored in int8"
        raise UserError(f"{name} is {kind} already; int8_weights takes plain float parameters.")
    bank = role.bank and parameter.ndim == 3
    if bank and parameter[0].numel() % group_size:
        raise UserError(
            f"{name} is a stack of matrices of {parameter[0].numel()} weights, which groups of "
            f"{group_size} do not divide; give a group_size that does."
        )
    turned = role.transposed and parameter.ndim == (3 if bank else 2)
    values = parameter.detach().to(compute_dtype(parameter.dtype))
    grid = to_grid(values.mT if turned else values, 8, group_size)
    stored = Int8Weight(
        grid, group_size, parameter.dtype, transposed=turned, strides=parameter.stride()
    )
    return nn.Parameter(stored)


def check_steps(
    label: str, rule: Rule, group: Mapping[str, Any], param: Tensor, runs: int | None
) -> None:
    """Raise UserError if a parameter is stored in int8 and its rule can't step it."""
    if not isinstance(param, Int8Weight):
        return
    if runs is not None:
        raise UserError("Weights of several runs can't be stored in int8; leave runs out.")
    if not rule.rounds_to_int8:
        raise UserError(
            f"{label} steps float weights, but one of shape {tuple(param.shape)} is stored in "
            "int8, where rounding to nearest would lose its small steps; q_apollo and q_galore, "
            "without wrappers, round at random."
        )
    if group["group_size"] != param.group_size:
        raise UserError(
            f"group_size of {label} is {group['group_size']}, but int8_weights stored a parameter "
            f"of shape {tuple(param.shape)} in groups of {param.group_size}; make them the same."
        )
