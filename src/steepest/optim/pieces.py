"""What is stepped of a parameter: all of it, a block of a fused matrix, or a sharded one's part.

Elementwise rules step a parameter of FSDP2 (a DTensor) where its shards are. For other rules, and
for those that draw random numbers, every process gathers it and its gradient, makes the same whole
step, and keeps its own shard of the result: the same numbers as in one process, for the memory and
time of not sharing that work. What is stepped together is gathered in one exchange.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from steepest.errors import UserError
from steepest.optim.int8 import Int8Weight
from steepest.optim.rule import Rule, State

Sharding = tuple[Any, tuple[Any, ...]]
"""Mesh and placements of a DTensor."""


@dataclass(frozen=True)
class Piece:
    """A part of a parameter that a rule sees as one tensor."""

    param: Tensor
    whole: bool = True
    """A sharded parameter is gathered; otherwise the piece is its local shard."""
    rows: tuple[int, int] | None = None
    """First row and number of rows of a block, None for all."""
    transposed: bool = False
    """The parameter is stored [in, out]; the rule sees [out, in]."""
    member: int | None = None
    """Which matrix of a stack of them, None where the parameter is not one."""
    suffix: str = ""
    """What is added to the names of its state in `optimizer.state`."""

    @property
    def cut(self) -> bool:
        """Whether the piece is a part or a transpose of what its process has of the parameter."""
        return self.rows is not None or self.member is not None or self.transposed

    @property
    def in_place(self) -> bool:
        """Whether a step of `value` is one of the parameter: it is all of it, or all of a shard.

        A matrix of what is stored in int8 shares its codes.
        """
        if isinstance(self.param, Int8Weight):
            return True
        return not self.cut and not (self.whole and isinstance(self.param, DTensor))

    def outline(self) -> Tensor:
        """Return a tensor of the shape, strides and dtype of `value`, without gathering it."""
        if self.whole and isinstance(self.param, DTensor):
            shape, dtype = self.param.shape, self.param.dtype
            return self.cut_of(torch.empty(shape, dtype=dtype, device="meta"))
        return self.value()

    @property
    def sharding(self) -> Sharding | None:
        """The mesh and placements of a local shard, None for what every process has whole."""
        return None if self.whole else _sharding(self.param)

    def value(self) -> Tensor:
        """Return the piece's values: a view, or a copy where they had to be gathered."""
        return values_of([self])[0]

    def write(self, new: Tensor) -> None:
        """Store new values of the piece in the parameter."""
        self._put(self.param, new)

    def write_grad(self, new: Tensor) -> None:
        """Store what is left in the gradient's buffer."""
        assert self.param.grad is not None
        self._put(self.param.grad, new)

    def _put(self, tensor: Tensor, new: Tensor) -> None:
        if not (self.whole and isinstance(tensor, DTensor)):
            self.cut_of(unsharded(tensor)).copy_(new)
            return
        local = tensor.to_local()
        if not self.cut:
            local.copy_(sharded(new, tensor).to_local())
            return
        # The rest of the parameter stays as it is.
        everything = local.new_zeros(tensor.shape)
        written = torch.zeros_like(everything, dtype=torch.bool)
        self.cut_of(everything).copy_(new)
        self.cut_of(written).fill_(True)
        mine, mask = (sharded(t, tensor).to_local() for t in (everything, written))
        local.copy_(torch.where(mask, mine, local))

    def cut_of(self, tensor: Tensor) -> Tensor:
        """Return a view of the piece in a tensor laid out as the parameter, or as its shard."""
        if self.member is not None:
            tensor = tensor[self.member]
        if self.transposed:
            tensor = tensor.mT
        if self.rows is not None:
            tensor = tensor.narrow(0, *self.rows)
        return tensor


def pieces_of(rule: Rule, params: Sequence[Tensor], group: Mapping[str, Any]) -> list[Piece]:
    """Return the pieces of a parameter group, a parameter's own next to each other.

    Raises UserError where the blocks that the group names are not the rows of a matrix.
    """
    if rule.elementwise:
        # Random numbers are those of an element's place in the whole parameter.
        return [Piece(p, whole=rule.draws or rule.whole) for p in params]
    return [piece for p in params for piece in _cut(rule, p, group)]


def _cut(rule: Rule, p: Tensor, group: Mapping[str, Any]) -> list[Piece]:
    turned = bool(group.get("transposed"))
    if group.get("bank") and p.ndim == 3:
        return [Piece(p, member=i, transposed=turned, suffix=f".{i}") for i in range(p.shape[0])]
    split, turned = group.get("split"), turned and p.ndim == 2
    if split is None or not rule.splits or p.ndim < 2:
        return [Piece(p, transposed=turned)]
    total = p.shape[1] if turned else p.shape[0]
    if sum(split) != total:
        raise UserError(
            f"A fused matrix of shape {tuple(p.shape)} was to be split into blocks of "
            f"{', '.join(map(str, split))} rows, which do not add up to {total}."
        )
    starts = [sum(split[:i]) for i in range(len(split))]
    return [
        Piece(p, rows=(start, size), transposed=turned, suffix=f".{index}")
        for index, (start, size) in enumerate(zip(starts, split, strict=True))
    ]


def values_of(pieces: Sequence[Piece]) -> list[Tensor]:
    """Return the values of each piece: a view, or a copy where they had to be gathered."""
    return _seen(pieces, [piece.param for piece in pieces])


def grads_of(pieces: Sequence[Piece]) -> list[Tensor]:
    """Return the gradient of each piece, a view or a copy as its values."""
    grads = [piece.param.grad for piece in pieces]
    return _seen(pieces, [grad for grad in grads if grad is not None])


def _seen(pieces: Sequence[Piece], tensors: Sequence[Tensor]) -> list[Tensor]:
    pairs = list(zip(pieces, tensors, strict=True))
    whole = _gathered([t for piece, t in pairs if piece.whole and isinstance(t, DTensor)])
    return [piece.cut_of(whole.get(t, unsharded(t))) for piece, t in pairs]


def _gathered(tensors: Iterable[DTensor]) -> dict[Tensor, Tensor]:
    """Return the whole of each sharded tensor; those that are alike are one exchange."""
    alike: dict[Any, list[DTensor]] = {}
    for tensor in dict.fromkeys(tensors):
        like = (tensor.shape, tensor.dtype, tensor.device_mesh, tensor.placements)
        alike.setdefault(like, []).append(tensor)
    found: dict[Tensor, Tensor] = {}
    for (_, _, _, placements), same in alike.items():
        if len(same) > 1 and all(type(p) in (Shard, Replicate) for p in placements):
            stacked: Any = torch.stack(tuple(same))
            found |= zip(same, stacked.full_tensor().unbind(0), strict=True)
        else:
            found |= {tensor: tensor.full_tensor() for tensor in same}
    return found


def shown(piece: Piece, state: State) -> State:
    """Return a piece's state under its names in `optimizer.state`, sharded as the parameter is."""
    named = {name + piece.suffix: value for name, value in state.items()}
    if piece.sharding is None:
        return named
    assert isinstance(piece.param, DTensor)
    mesh, placements = piece.sharding
    local = piece.param.to_local()
    return {
        name: DTensor.from_local(
            value,
            mesh,
            placements,
            run_check=False,
            shape=piece.param.shape,
            stride=piece.param.stride(),
        )
        if value.shape == local.shape
        else value
        for name, value in named.items()
    }


def sharded(value: Tensor, like: DTensor) -> DTensor:
    """Return a tensor that every process has whole, sharded as `like`."""
    everywhere = [Replicate()] * like.device_mesh.ndim
    whole = DTensor.from_local(value, like.device_mesh, everywhere, run_check=False)
    return whole.redistribute(placements=like.placements)


def copy_to(target: Tensor, value: Tensor) -> None:
    """Copy values in place, where target and value may each be sharded or whole."""
    if isinstance(target, DTensor) and not isinstance(value, DTensor):
        value = sharded(value.to(target.device), target)
    elif isinstance(value, DTensor) and not isinstance(target, DTensor):
        value = value.full_tensor()
    target.copy_(value)


def unsharded(value: Tensor) -> Tensor:
    """Return the local part of a tensor that may be sharded."""
    return value.to_local() if isinstance(value, DTensor) else value


def added_up(sums: Mapping[Sharding | None, Tensor]) -> Tensor:
    """Return a sum over all shards from the local sums by sharding, None for unsharded tensors.

    One exchange per sharding, since how many buckets the shards fill differs between processes.
    """
    totals = [_everywhere(value, sharding) for sharding, value in sums.items()]
    return torch.stack([t.to(totals[0].device) for t in totals]).sum(0)


def _everywhere(value: Tensor, sharding: Sharding | None) -> Tensor:
    if sharding is None:
        return value
    mesh, placements = sharding
    parts = [Partial() if placement.is_shard() else Replicate() for placement in placements]
    whole: Tensor = DTensor.from_local(value, mesh, parts, run_check=False).full_tensor()
    return whole


def anywhere(tensors: Iterable[Tensor], is_so: Callable[[Tensor], Tensor]) -> bool:
    """Say whether something is so of a largest magnitude (NaN above all), in any process."""
    alike: dict[Sharding | None, list[Tensor]] = {}
    for tensor in tensors:
        alike.setdefault(_sharding(tensor), []).append(unsharded(tensor))
    found = {}
    for sharding, local in alike.items():
        some = [tensor for tensor in local if tensor.numel()]
        largest = torch.nn.utils.get_total_norm(some, torch.inf).to(local[0].device)
        found[sharding] = is_so(largest).to(torch.float32)
    return bool(found) and bool(added_up(found) > 0)


def _sharding(tensor: Tensor) -> Sharding | None:
    if isinstance(tensor, DTensor):
        return tensor.device_mesh, tuple(tensor.placements)
    return None
