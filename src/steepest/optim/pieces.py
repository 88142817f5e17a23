"""What is stepped of a parameter: all of it, a block of a fused matrix, or a sharded one's part.

Elementwise rules step a parameter of FSDP2 (a DTensor) where its shards are. For other rules every
process gathers it and its gradient, makes the same whole step, and keeps its own shard of the
result: the same numbers as in one process, for the memory and time of not sharing that work.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate

from steepest.errors import UserError
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
    def plain(self) -> bool:
        """Whether the piece is the parameter itself."""
        cut = self.rows is not None or self.member is not None or self.transposed
        return not cut and not isinstance(self.param, DTensor)

    @property
    def sharding(self) -> Sharding | None:
        """The mesh and placements of a local shard, None for what every process has whole."""
        if isinstance(self.param, DTensor) and not self.whole:
            return self.param.device_mesh, tuple(self.param.placements)
        return None

    def value(self) -> Tensor:
        """Return the piece's values: a view, or a copy where they had to be gathered."""
        return self._of(self.param)

    def grad(self) -> Tensor:
        """Return the piece's gradient, a view or a copy as `value`."""
        assert self.param.grad is not None
        return self._of(self.param.grad)

    def write(self, new: Tensor) -> None:
        """Store new values of the piece in the parameter."""
        if isinstance(self.param, DTensor) and self.whole:
            mesh, placements = self.param.device_mesh, self.param.placements
            everywhere = [Replicate()] * mesh.ndim
            shared = DTensor.from_local(new, mesh, everywhere, run_check=False)
            self.param.to_local().copy_(shared.redistribute(placements=placements).to_local())
        else:
            self.value().copy_(new)

    def write_grad(self, new: Tensor) -> None:
        """Store what is left in the gradient's buffer."""
        self.grad().copy_(new)

    def _of(self, tensor: Tensor) -> Tensor:
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor() if self.whole else tensor.to_local()
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
        return [Piece(p, whole=False) for p in params]
    found = [piece for p in params for piece in _cut(rule, p, group)]
    for piece in found:
        if isinstance(piece.param, DTensor) and piece.suffix:
            raise UserError(
                f"A sharded matrix of shape {tuple(piece.param.shape)} cannot be stepped block by "
                "block; keep query, key, value and experts as matrices of their own."
            )
    return found


def _cut(rule: Rule, p: Tensor, group: Mapping[str, Any]) -> list[Piece]:
    if group.get("bank") and p.ndim == 3:
        return [Piece(p, member=i, suffix=f".{i}") for i in range(p.shape[0])]
    split, turned = group.get("split"), bool(group.get("transposed")) and p.ndim == 2
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


def unsharded(value: Tensor) -> Tensor:
    """Return the local part of a tensor that may be sharded."""
    return value.to_local() if isinstance(value, DTensor) else value


def added_up(value: Tensor, sharding: Sharding | None) -> Tensor:
    """Return a sum over all shards from the sum over the local one."""
    if sharding is None:
        return value
    mesh, placements = sharding
    parts = [Partial() if placement.is_shard() else Replicate() for placement in placements]
    whole: Tensor = DTensor.from_local(value, mesh, parts, run_check=False).full_tensor()
    return whole


def full(value: Tensor) -> Tensor:
    """Return a tensor that every process has whole."""
    return value.full_tensor() if isinstance(value, DTensor) else torch.as_tensor(value)
