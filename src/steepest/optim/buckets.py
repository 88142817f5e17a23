"""Which parameters are stepped together, and where their state lives.

State is kept where it is stepped: one tensor for a whole bucket wherever that saves calls. What
`optimizer.state` shows of each parameter are views of it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from steepest.optim.rule import Rule, State

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
    """What receives the new parameters: themselves, or where they were joined."""


@dataclass
class Bucket(ABC):
    """Parameters stepped by one call, of one rule, dtype and device."""

    params: list[Tensor]
    states: list[State]
    runs: int | None

    @abstractmethod
    def views(self, index: int) -> State:
        """Return the state of one parameter, sharing memory with what is stepped."""

    @abstractmethod
    def some(self, indices: list[int]) -> Bucket:
        """Return a bucket of some of the parameters, with copies of their state."""

    @abstractmethod
    def gather(self, rule: Rule) -> Inputs:
        """Return what a step reads. Every parameter must have a gradient."""

    def scatter(self, inputs: Inputs) -> None:  # noqa: B027 - most buckets step in place
        """Write stepped parameters back where `gather` made copies of them."""

    def grads(self) -> list[Tensor]:
        """Return the gradients of the parameters."""
        return [p.grad for p in self.params if p.grad is not None]


class Separate(Bucket):
    """Elementwise parameters of one shape, large enough to be stepped in place."""

    def views(self, index: int) -> State:
        return self.states[index]

    def some(self, indices: list[int]) -> Bucket:
        states = [{k: v.clone() for k, v in self.states[i].items()} for i in indices]
        return Separate([self.params[i] for i in indices], states, self.runs)

    def gather(self, rule: Rule) -> Inputs:
        return Inputs(self.grads(), self.params, self.states, self.params)


class Joined(Bucket):
    """Small elementwise parameters of any shape, end to end in one flat tensor."""

    def views(self, index: int) -> State:
        p = self.params[index]
        return {
            name: self._split(flat)[index].view(p.shape) for name, flat in self.states[0].items()
        }

    def some(self, indices: list[int]) -> Bucket:
        parts = {name: self._split(flat) for name, flat in self.states[0].items()}
        state = {name: torch.cat([split[i] for i in indices], -1) for name, split in parts.items()}
        return Joined([self.params[i] for i in indices], [state], self.runs)

    def gather(self, rule: Rule) -> Inputs:
        joined = [self._join(self.params)]
        return Inputs([self._join(self.grads())], joined, self.states, joined)

    def scatter(self, inputs: Inputs) -> None:
        pieces = zip(self._split(inputs.targets[0]), self.params, strict=True)
        torch._foreach_copy_(self.params, [piece.view(p.shape) for piece, p in pieces])

    def _split(self, flat: Tensor) -> tuple[Tensor, ...]:
        return torch.split(flat, [p.numel() // (self.runs or 1) for p in self.params], -1)

    def _join(self, tensors: list[Tensor]) -> Tensor:
        return join(tensors, self.runs)


class Stacked(Bucket):
    """Parameters of one shape, over which a rule is mapped: state has a leading dimension."""

    def views(self, index: int) -> State:
        return {name: stack[index] for name, stack in self.states[0].items()}

    def some(self, indices: list[int]) -> Bucket:
        rows = torch.tensor(indices, device=self.params[0].device)
        state = {name: stack[rows] for name, stack in self.states[0].items()}
        return Stacked([self.params[i] for i in indices], [state], self.runs)

    def gather(self, rule: Rule) -> Inputs:
        grads = stack(self.grads())
        if rule.reads_param:
            return Inputs([grads], [stack(self.params)], self.states, self.params)
        unread = grads.new_full((), torch.nan, dtype=self.params[0].dtype)
        return Inputs([grads], [unread.expand_as(grads)], self.states, self.params)


@contextmanager
def subset(bucket: Bucket, indices: list[int]) -> Iterator[Bucket]:
    """Yield a bucket of some of the parameters; on exit their state is back in the whole."""
    part = bucket.some(indices)
    yield part
    for i, index in enumerate(indices):
        whole = bucket.views(index)
        for name, value in part.views(i).items():
            whole[name].copy_(value)


def new_buckets(rule: Rule, params: Iterable[Tensor], runs: int | None) -> list[Bucket]:
    """Return buckets of parameters that have not been stepped, each of bounded size."""
    alike: dict[Any, list[Tensor]] = {}
    for p in params:
        small = rule.elementwise and p.numel() <= SMALL and p.is_contiguous()
        like = "small" if small else (p.shape, p.stride())
        alike.setdefault((like, p.dtype, p.device), []).append(p)
    return [
        _new_bucket(rule, chunk, runs, joined=like[0] == "small")
        for like, same in alike.items()
        for chunk in _chunks(rule, same, joined=like[0] == "small")
    ]


def _chunks(rule: Rule, params: list[Tensor], *, joined: bool) -> list[list[Tensor]]:
    if joined:
        return [params]
    size = CHUNK
    if not rule.elementwise:
        limit = STACK_ELEMENTS.get(params[0].device.type, STACK_ELEMENTS_ELSEWHERE)
        most = max(1, limit // max(1, params[0].numel()))
        stacks = -(-len(params) // most)
        size = -(-len(params) // stacks)  # of equal length: a last stack of one wastes the cores
    return [params[i : i + size] for i in range(0, len(params), size)]


def _new_bucket(rule: Rule, params: list[Tensor], runs: int | None, *, joined: bool) -> Bucket:
    init = rule.init if runs is None else torch.vmap(rule.init)
    wide = [p.detach().to(compute_dtype(p.dtype)) for p in params]
    if joined:
        return Joined(params, [init(join(wide, runs))], runs)
    if rule.elementwise:
        return Separate(params, [init(w) for w in wide], runs)
    return Stacked(params, [torch.vmap(init)(stack(wide))], runs)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that rules see: at least float32, so that small updates are not lost."""
    return torch.promote_types(dtype, torch.float32)


def join(tensors: list[Tensor], runs: int | None) -> Tensor:
    """Return the tensors' elements end to end, `[n]`, or `[runs, n]` when there are runs."""
    return torch.cat([t.reshape((runs, -1) if runs else (-1,)) for t in tensors], -1)


def stack(tensors: list[Tensor]) -> Tensor:
    """Return the tensors as one with a new leading dimension; no copy of a single one."""
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(tensors)
