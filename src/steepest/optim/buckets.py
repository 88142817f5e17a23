"""Which parameters are stepped together, and where their state lives.

State is kept where it is stepped: one tensor for a whole bucket wherever that saves calls. What
`optimizer.state` shows of each parameter are views of it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from steepest.optim.pieces import Piece
from steepest.optim.rule import Rule, State, compute_dtype

SMALL = 1 << 16
"""Elements up to which elementwise parameters are joined end to end: for those a call costs more
than moving their elements."""

CHUNK = 8
"""Larger elementwise tensors of one shape that share a compiled call. A larger chunk saves
microseconds a call; a smaller one compiles faster and serves any depth with the same kernel."""

STACK_ELEMENTS = {"cpu": 6_000_000}
"""Elements in one stack at most, by device type. On a CPU a larger batch gains nothing, and its
temporaries are taken from the system and given back at every step."""

STACK_ELEMENTS_ELSEWHERE = 1 << 27
"""The same for other devices: it bounds the copy of the gradients that a stack makes."""


class Inputs(NamedTuple):
    """What a kernel works on."""

    grads: list[Tensor]
    """One tensor per parameter, or one for the whole bucket; so are `params` and `states`."""
    params: list[Tensor]
    states: list[State]
    targets: list[Tensor]
    """What receives the new parameters: themselves, or where they were copied to."""


@dataclass
class Bucket(ABC):
    """Pieces of parameters stepped by one call, of one rule, dtype and device."""

    pieces: list[Piece]
    states: list[State]
    runs: int | None
    seen: object = None

    @abstractmethod
    def views(self, index: int) -> State:
        """Return the state of one piece, sharing memory with what is stepped."""

    @abstractmethod
    def some(self, indices: list[int]) -> Bucket:
        """Return a bucket of some of the pieces, with copies of their state."""

    @abstractmethod
    def gather(self, *, params: bool = True, grads: bool = True) -> Inputs:
        """Return what a step reads: of `params` and `grads`, NaN stands for what it does not.

        Every piece must have a gradient if gradients are read.
        """

    def scatter(self, inputs: Inputs) -> None:
        """Write stepped parameters back where `gather` made copies of them."""
        for piece, target in zip(self.pieces, inputs.targets, strict=True):
            if not piece.in_place:
                piece.write(target)

    def scatter_grads(self, inputs: Inputs) -> None:
        """Write what is left in the gradients back where `gather` made copies of them."""
        for piece, grad in zip(self.pieces, self.split(inputs.grads), strict=True):
            piece.write_grad(grad)

    def split(self, tensors: list[Tensor]) -> Sequence[Tensor]:
        """Return what `gather` made of the pieces, piece by piece."""
        return tensors

    def signature(self) -> object:
        """Return all that a compiled step of this bucket depends on beside the rule."""
        if self.seen is None:
            self.seen = tuple(
                (p.dtype, p.device, p.shape, p.stride()) for p in map(Piece.value, self.pieces)
            )
        return type(self), self.seen, tuple(self.states[0])

    def on_cpu(self) -> bool:
        """Say whether the pieces are in the host's memory."""
        return self.pieces[0].param.device.type == "cpu"

    def values(self) -> list[Tensor]:
        """Return what receives the new parameters; copies where they are not in one place."""
        return [p.value() if p.in_place else _own(p.value()) for p in self.pieces]


class Separate(Bucket):
    """Elementwise parameters of one shape, large enough to be stepped in place."""

    def views(self, index: int) -> State:
        return self.states[index]

    def some(self, indices: list[int]) -> Bucket:
        states = [{k: v.clone() for k, v in self.states[i].items()} for i in indices]
        return Separate([self.pieces[i] for i in indices], states, self.runs)

    def gather(self, *, params: bool = True, grads: bool = True) -> Inputs:
        targets = self.values()
        seen = [piece.grad() for piece in self.pieces] if grads else [unread(t) for t in targets]
        return Inputs(seen, targets, self.states, targets)


class Joined(Bucket):
    """Small elementwise parameters of any shape, end to end in one flat tensor."""

    def views(self, index: int) -> State:
        shape = self.pieces[index].value().shape
        return {name: self._split(flat)[index].view(shape) for name, flat in self.states[0].items()}

    def some(self, indices: list[int]) -> Bucket:
        parts = {name: self._split(flat) for name, flat in self.states[0].items()}
        state = {name: torch.cat([split[i] for i in indices], -1) for name, split in parts.items()}
        return Joined([self.pieces[i] for i in indices], [state], self.runs)

    def gather(self, *, params: bool = True, grads: bool = True) -> Inputs:
        joined = [join(self.values(), self.runs)]
        own = join([piece.grad() for piece in self.pieces], self.runs) if grads else None
        return Inputs([unread(joined[0]) if own is None else own], joined, self.states, joined)

    def scatter(self, inputs: Inputs) -> None:
        values = self.values()
        parts = zip(self._split(inputs.targets[0]), values, strict=True)
        torch._foreach_copy_(values, [part.view(value.shape) for part, value in parts])

    def split(self, tensors: list[Tensor]) -> Sequence[Tensor]:
        parts = zip(self._split(tensors[0]), self.pieces, strict=True)
        return [part.view(piece.value().shape) for part, piece in parts]

    def _split(self, flat: Tensor) -> tuple[Tensor, ...]:
        sizes = [piece.value().numel() // (self.runs or 1) for piece in self.pieces]
        return torch.split(flat, sizes, -1)


class Stacked(Bucket):
    """Parameters of one shape, over which a rule is mapped: state has a leading dimension."""

    def views(self, index: int) -> State:
        return {name: stack[index] for name, stack in self.states[0].items()}

    def some(self, indices: list[int]) -> Bucket:
        state = {
            name: stack[torch.tensor(indices, device=stack.device)]
            for name, stack in self.states[0].items()
        }
        return Stacked([self.pieces[i] for i in indices], [state], self.runs)

    def gather(self, *, params: bool = True, grads: bool = True) -> Inputs:
        targets = self.values()
        one = targets[0].expand(len(targets), *targets[0].shape)
        seen = stack([piece.grad() for piece in self.pieces]) if grads else unread(one)
        return Inputs([seen], [stack(targets) if params else unread(one)], self.states, targets)

    def split(self, tensors: list[Tensor]) -> Sequence[Tensor]:
        return tensors[0].unbind(0)


def copy_state(part: Bucket, whole: Bucket, indices: list[int]) -> None:
    """Put the state of `whole.some(indices)` back into the whole."""
    for i, index in enumerate(indices):
        kept = whole.views(index)
        for name, value in part.views(i).items():
            kept[name].copy_(value)


Keys = dict[Tensor, Tensor]
"""Random key of each parameter."""


def new_buckets(rule: Rule, pieces: Iterable[Piece], runs: int | None, keys: Keys) -> list[Bucket]:
    """Return buckets of pieces that have not been stepped, each of bounded size."""
    alike: dict[Any, list[Piece]] = {}
    for piece in pieces:
        p = piece.value()
        small = p.numel() <= SMALL and p.is_contiguous() and _joins(rule, p, runs)
        like = "small" if small else (p.shape, p.stride())
        alike.setdefault((like, p.dtype, p.device, piece.sharding), []).append(piece)
    return [
        _new_bucket(rule, chunk, runs, keys, joined=like[0] == "small")
        for like, same in alike.items()
        for chunk in _chunks(rule, same, joined=like[0] == "small")
    ]


def _joins(rule: Rule, p: Tensor, runs: int | None) -> bool:
    """Say whether the rule steps elements alone: nothing in its state is of a whole tensor."""
    one = torch.empty(p.shape[1:] if runs else p.shape, device="meta")
    return (
        rule.elementwise
        and not (rule.draws or rule.whole)
        and all(value.shape == one.shape for value in rule.init(one).values())
    )


def _chunks(rule: Rule, pieces: list[Piece], *, joined: bool) -> list[list[Piece]]:
    if joined:
        return [pieces]
    size = CHUNK
    if not rule.elementwise:
        p = pieces[0].value()
        limit = STACK_ELEMENTS.get(p.device.type, STACK_ELEMENTS_ELSEWHERE)
        most = max(1, limit // max(1, p.numel()))
        stacks = -(-len(pieces) // most)
        size = -(-len(pieces) // stacks)  # of equal length: a last stack of one wastes the cores
    return [pieces[i : i + size] for i in range(0, len(pieces), size)]


def _new_bucket(
    rule: Rule, pieces: list[Piece], runs: int | None, keys: Keys, *, joined: bool
) -> Bucket:
    init = rule.init if runs is None else torch.vmap(rule.init)
    wide = [v.detach().to(compute_dtype(v.dtype)) for v in map(Piece.value, pieces)]
    if joined:
        return Joined(pieces, [init(join(wide, runs))], runs)
    states = [init(w) for w in wide] if rule.elementwise else [torch.vmap(init)(stack(wide))]
    if rule.draws:
        of = [keys[piece.param].to(w.device) for piece, w in zip(pieces, wide, strict=True)]
        if runs is not None:
            of = [key.expand(runs).clone() for key in of]
        for state, key in zip(states, of if rule.elementwise else [stack(of)], strict=True):
            state["key"] = key
    return (Separate if rule.elementwise else Stacked)(pieces, states, runs)


def join(tensors: Sequence[Tensor], runs: int | None) -> Tensor:
    """Return the tensors' elements end to end, `[n]`, or `[runs, n]` when there are runs."""
    return torch.cat([t.reshape((runs, -1) if runs else (-1,)) for t in tensors], -1)


def stack(tensors: Sequence[Tensor]) -> Tensor:
    """Return the tensors as one with a new leading dimension; no copy of a single one."""
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(tuple(tensors))


def unread(like: Tensor) -> Tensor:
    """Return NaN in a shape, without the memory: what reads it shows."""
    return like.new_full((), torch.nan).expand_as(like)


def _own(value: Tensor) -> Tensor:
    return value.contiguous() if not value.is_contiguous() else value.clone()
