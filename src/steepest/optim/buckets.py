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

from steepest.optim.pieces import Piece, grads_of, values_of
from steepest.optim.rule import Rule, State, compute_dtype

SMALL = 1 << 16
"""Elements up to which elementwise parameters are joined end to end: for those a call costs more
than moving their elements."""

ALONE = 1 << 12
"""Elements above which one of those that steps apart from the rest has a call of its own. Smaller
ones are copied into one bucket, which is stepped eagerly, as a compiled step would be one for each
number of them: the eager step of so few elements takes as long as a call."""

ALONE_OF_STACK = 1 << 16
"""The same for parameters in a stack: small matrices are faster together."""

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
    source: tuple[Bucket, list[int]] | None = None
    """What the states are copies of: these pieces of a bucket. None where they are the state."""
    seen: object = None

    @abstractmethod
    def views(self, index: int) -> State:
        """Return the state of one piece, sharing memory with what is stepped."""

    @abstractmethod
    def parts(self, indices: list[int]) -> list[Bucket]:
        """Return some of the pieces, in buckets of their own: large ones alone, where they are.

        So any subset of them is stepped by the same compiled call, once for each.
        """

    def give_back(self) -> None:
        """Bring the states back to what they are copies of."""
        if self.source is None:
            return
        whole, indices = self.source
        for i, index in enumerate(indices):
            kept = whole.views(index)
            for name, value in self.views(i).items():
                kept[name].copy_(value)

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
            outlines = [(piece.param.device, piece.outline()) for piece in self.pieces]
            self.seen = tuple((device, p.dtype, p.shape, p.stride()) for device, p in outlines)
        return type(self), self.seen, tuple(self.states[0])

    def on_cpu(self) -> bool:
        """Say whether the pieces are in the host's memory."""
        return self.pieces[0].param.device.type == "cpu"

    def values(self) -> list[Tensor]:
        """Return what receives the new parameters; copies where they are not in one place."""
        pairs = zip(self.pieces, values_of(self.pieces), strict=True)
        return [value if piece.in_place else _own(value) for piece, value in pairs]


class Separate(Bucket):
    """Elementwise parameters of one shape, large enough to be stepped in place."""

    def views(self, index: int) -> State:
        return self.states[index]

    def parts(self, indices: list[int]) -> list[Bucket]:
        return [Separate([self.pieces[i]], [self.states[i]], self.runs) for i in indices]

    def gather(self, *, params: bool = True, grads: bool = True) -> Inputs:
        targets = self.values()
        seen = grads_of(self.pieces) if grads else [unread(t) for t in targets]
        return Inputs(seen, targets, self.states, targets)


class Joined(Bucket):
    """Small elementwise parameters of any shape, end to end in one flat tensor."""

    def views(self, index: int) -> State:
        shape = self.pieces[index].value().shape
        return {name: self._split(flat)[index].view(shape) for name, flat in self.states[0].items()}

    def parts(self, indices: list[int]) -> list[Bucket]:
        splits = {name: self._split(flat) for name, flat in self.states[0].items()}
        large = {i for i in indices if self.pieces[i].outline().numel() > ALONE}
        found: list[Bucket] = [
            Joined([self.pieces[i]], [{n: split[i] for n, split in splits.items()}], self.runs)
            for i in sorted(large)
        ]
        if small := [i for i in indices if i not in large]:
            copies = {n: torch.cat([split[i] for i in small], -1) for n, split in splits.items()}
            pieces = [self.pieces[i] for i in small]
            found.append(Joined(pieces, [copies], self.runs, (self, small)))
        return found

    def gather(self, *, params: bool = True, grads: bool = True) -> Inputs:
        joined = [join(self.values(), self.runs)]
        own = join(grads_of(self.pieces), self.runs) if grads else None
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

    def parts(self, indices: list[int]) -> list[Bucket]:
        (state,) = self.states
        if self.pieces[0].outline().numel() > ALONE_OF_STACK:
            alone = [{name: stack[i : i + 1] for name, stack in state.items()} for i in indices]
            return [
                Stacked([self.pieces[i]], [own], self.runs)
                for i, own in zip(indices, alone, strict=True)
            ]
        copies = {name: torch.stack([stack[i] for i in indices]) for name, stack in state.items()}
        return [Stacked([self.pieces[i] for i in indices], [copies], self.runs, (self, indices))]

    def gather(self, *, params: bool = True, grads: bool = True) -> Inputs:
        targets = self.values()
        none = unread(targets[0], len(targets))
        seen = stack(grads_of(self.pieces)) if grads else none
        return Inputs([seen], [stack(targets) if params else none], self.states, targets)

    def split(self, tensors: list[Tensor]) -> Sequence[Tensor]:
        return tensors[0].unbind(0)


Keys = dict[Tensor, Tensor]
"""Random key of each parameter."""


def new_buckets(rule: Rule, pieces: Iterable[Piece], runs: int | None, keys: Keys) -> list[Bucket]:
    """Return buckets of pieces that have not been stepped, each of bounded size."""
    alike: dict[Any, list[Piece]] = {}
    for piece in pieces:
        p = piece.outline()
        small = p.numel() <= SMALL and p.is_contiguous() and _joins(rule, p, runs)
        like = "small" if small else (p.shape, p.stride())
        alike.setdefault((like, p.dtype, piece.param.device, piece.sharding), []).append(piece)
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
        place, elements = pieces[0].param.device.type, pieces[0].outline().numel()
        limit = STACK_ELEMENTS.get(place, STACK_ELEMENTS_ELSEWHERE)
        most = max(1, limit // max(1, elements))
        stacks = -(-len(pieces) // most)
        size = -(-len(pieces) // stacks)  # of equal length: a last stack of one wastes the cores
    return [pieces[i : i + size] for i in range(0, len(pieces), size)]


def _new_bucket(
    rule: Rule, pieces: list[Piece], runs: int | None, keys: Keys, *, joined: bool
) -> Bucket:
    init = rule.init if runs is None else torch.vmap(rule.init)
    wide = [v.detach().to(compute_dtype(v.dtype)) for v in values_of(pieces)]
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


def unread(like: Tensor, *count: int) -> Tensor:
    """Return NaN in a shape, or so many of them, without the memory: what reads it shows."""
    return like.new_full((), torch.nan).expand(*count, *like.shape)


def _own(value: Tensor) -> Tensor:
    return value.contiguous() if not value.is_contiguous() else value.clone()
