"""How rules run: like parameters together, eager or compiled, lr and decay applied, in place."""

from __future__ import annotations

import functools
import itertools
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch._dynamo import exc as dynamo

from steepest import compiler
from steepest.optim.buckets import Bucket, Inputs, Joined, Separate
from steepest.optim.live import Hyper, Layout
from steepest.optim.rule import Rule, State, compute_dtype
from steepest.optim.wrapper import overrides

BLOCK = 1 << 18
"""Elements that an elementwise rule steps at a time when run eagerly on a CPU, so that the
temporaries of its dozen operations stay in the cache."""

COMPILE_ERRORS = (dynamo.TorchDynamoException, dynamo.FailOnRecompileLimitHit)

OPTIONS: tuple[dict[str, Any] | None, ...] = (None, {"realize_reads_threshold": 1})
"""Of inductor, in the order in which they are tried: torch 2.13's default fails on mars_adamw
(https://github.com/pytorch/pytorch/issues/196570), and fusing less does not."""

Phase = Literal["update", "start", "prepare", "refresh", "observe", "measure", "average"]

DIRECTION = "direction"
"""Key of the direction beside the new state, where a pure step returns both."""

PARAM = "param"
"""Key of the new parameter beside the state that moving it changed."""

GRAD = "grad"
"""Key of what stays in the gradient's buffer, for rules that keep it."""

Kernel = Callable[[Inputs, Tensor], dict[str, Tensor] | None]
"""In place, from gathered inputs and packed live values: new states and new targets. The phase
"measure" changes nothing and returns sums over the bucket."""


def remembered(
    rule: Rule, values: Mapping[str, Any], step: int, memory: Mapping[str, Any], runs: int | None
) -> dict[str, Any]:
    """Return the memory that this step sees: numbers, or tuples of one number per run."""
    if not memory:
        return {}
    if runs is None:
        return rule.remember(step, {**values, **memory})
    each = [rule.remember(step, _of_run(values, memory, run)) for run in range(runs)]
    return {name: tuple(one[name] for one in each) for name in memory}


def with_scalars(
    rule: Rule, values: Mapping[str, Any], step: int, memory: Mapping[str, Any], runs: int | None
) -> dict[str, Any]:
    """Return the live values, the memory and the rule's scalars at this step.

    Where there are runs, memory and scalars are float64 tensors of one number per run.
    """
    own = {"step": float(step)} if rule.draws else {}
    if runs is None:
        seen = {**values, **memory}
        return {**seen, **rule.scalars(step, seen), **own}
    each = [rule.scalars(step, _of_run(values, memory, run)) for run in range(runs)]
    scalars = {name: torch.tensor([s[name] for s in each], dtype=torch.float64) for name in each[0]}
    kept = {name: torch.tensor(per_run, dtype=torch.float64) for name, per_run in memory.items()}
    return {**values, **kept, **scalars, **own}


def _of_run(values: Mapping[str, Any], memory: Mapping[str, Any], run: int) -> dict[str, Any]:
    own = {name: _number(value, run) for name, value in values.items()}
    return own | {name: per_run[run] for name, per_run in memory.items()}


def _number(value: Any, run: int) -> Any:
    if isinstance(value, tuple):
        return tuple(_number(v, run) for v in value)
    return float(value[run]) if isinstance(value, Tensor) else value


def kernel(
    rule: Rule,
    layout: Layout,
    runs: int | None,
    bucket: Bucket,
    *,
    phase: Phase = "update",
    compile: bool = False,
) -> Kernel:
    """Return the in-place step of a bucket, or another phase of it."""
    if not compile:
        blocks = runs is None and isinstance(bucket, (Joined, Separate)) and bucket.on_cpu()
        return _eager(rule, layout, runs, phase, blocks=blocks)
    return _compiled(rule, layout, runs, phase, bucket.signature())


@functools.lru_cache(maxsize=4096)
def _eager(
    rule: Rule, layout: Layout, runs: int | None, phase: Phase, blocks: bool = False
) -> Kernel:
    def pure(grad: Tensor, param: Tensor, state: State, values: Tensor) -> State:
        return _phase(rule, phase, (grad, param, state), layout.unpack(values))

    def move(param: Tensor, direction: Tensor, state: State, values: Tensor) -> State:
        new, changed = rule.move(param, direction, state, layout.unpack(values))
        return {**changed, PARAM: new}

    one = pure if runs is None else torch.vmap(pure, in_dims=(0, 0, 0, 1))
    moved = move if runs is None else torch.vmap(move, in_dims=(0, 0, 0, 1))

    def put(param: Tensor, grad: Tensor, state: State, new: State, v: Tensor) -> None:
        direction = new.pop(DIRECTION, None)
        if GRAD in new:
            grad.copy_(new.pop(GRAD))
        if direction is not None:
            _store(state, new)
            new = moved(param, direction, state, v)
        if PARAM in new:
            param.copy_(new.pop(PARAM))
        _store(state, new)

    def each(inputs: Inputs, v: Tensor) -> None:
        for grad, param, state in zip(*inputs[:3], strict=True):
            for g, p, s in _blocks(grad, param, state) if blocks else [(grad, param, state)]:
                put(p, g, s, one(g, p, s, v), v)

    def together(inputs: Inputs, v: Tensor) -> None:
        (grads,), (seen,), (state,), targets = inputs
        new = torch.vmap(one, in_dims=(0, 0, 0, None))(grads, seen, state, v)
        if GRAD in new:
            grads.copy_(new.pop(GRAD))
        directions, params = new.pop(DIRECTION, None), new.pop(PARAM, None)
        _store(state, new)
        for i, param in enumerate(targets):
            own = {name: value[i] for name, value in state.items()}
            if directions is not None:
                changed = moved(param, directions[i], own, v)
                param.copy_(changed.pop(PARAM))
                _store(own, changed)
            elif params is not None:
                param.copy_(params[i])

    def measure(inputs: Inputs, v: Tensor) -> dict[str, Tensor]:
        parts = []
        for grad, param, state in zip(*inputs[:3], strict=True):
            if rule.elementwise:
                cut = _blocks(grad, param, state) if blocks else [(grad, param, state)]
                parts += [one(g, p, s, v) for g, p, s in cut]
            else:
                stacked = torch.vmap(one, in_dims=(0, 0, 0, None))(grad, param, state, v)
                parts.append({name: merged(each.unbind(0), runs) for name, each in stacked.items()})
        return {name: merged([part[name] for part in parts], runs) for name in parts[0]}

    if phase == "measure":
        return measure
    if phase == "prepare" and overrides(rule, "due"):
        return _of_the_due(rule, layout, runs, together)
    return each if rule.elementwise else together


def _of_the_due(rule: Rule, layout: Layout, runs: int | None, prepare: Kernel) -> Kernel:
    """Return a kernel that prepares those of a stack that are due, which the host waits to know."""

    def due(state: State, values: Tensor) -> Tensor:
        return rule.due(state, layout.unpack(values))

    one = due if runs is None else torch.vmap(due, in_dims=(0, 1))

    def run(inputs: Inputs, v: Tensor) -> None:
        (grads,), (seen,), (state,), targets = inputs
        found = torch.vmap(one, in_dims=(0, None))(state, v)
        if chosen := found.view(len(found), -1).any(1).nonzero().flatten().tolist():
            part = {name: value[chosen] for name, value in state.items()}
            some = [targets[i] for i in chosen]
            prepare(Inputs([grads[chosen]], [seen[chosen]], [part], some), v)
            for name, value in part.items():
                state[name][chosen] = value

    return run


def merged(parts: Sequence[Tensor], runs: int | None) -> Tensor:
    """Return what was measured of several parameters: sums added up, values end to end."""
    if is_sum(parts[0], runs):
        return torch.stack(tuple(parts)).sum(0)
    return torch.cat(tuple(parts), -1)


def is_sum(measured: Tensor, runs: int | None) -> bool:
    """Say whether what a rule measured is a sum, and not values of which it takes a median."""
    return measured.ndim == (0 if runs is None else 1)


def _phase(
    rule: Rule, phase: Phase, seen: tuple[Tensor, Tensor, State], h: Hyper
) -> dict[str, Tensor]:
    """Return what a phase of the rule gives, in the dtype that rules compute in."""
    grad, param, state = seen
    param = param.to(compute_dtype(param.dtype))
    grad = grad.to(param.dtype)
    if phase == "update":
        direction, changed = rule.update(grad, param, state, h)
        return _apart({**changed, DIRECTION: direction}, grad, state)
    if phase == "average":
        return {PARAM: rule.average(param, state, h)}
    if phase == "measure":
        return rule.measure(grad, param, state, h)
    work = {
        "start": rule.start,
        "prepare": rule.prepare,
        "refresh": rule.refresh,
        "observe": rule.observe,
    }
    return _apart(work[phase](grad, param, state, h), grad, state)


def _apart(new: State, grad: Tensor, state: State) -> State:
    """Return what a phase gives, copied where it is what the phase gave under another name anew.

    For a direction that is the old momentum, or the gradient where that is state.
    """
    written = [state[name] for name, value in new.items() if state.get(name, value) is not value]
    written += [grad] if GRAD in new else []
    return {
        name: value.clone() if any(value is one for one in written) else value
        for name, value in new.items()
    }


def _store(state: State, new: State) -> None:
    for name, value in new.items():
        state[name].copy_(value)


def _blocks(grad: Tensor, param: Tensor, state: State) -> Iterator[tuple[Tensor, Tensor, State]]:
    """Yield views of one parameter's tensors, small enough to stay in the cache."""
    alike = (grad, param, *state.values())
    if param.numel() <= BLOCK or not all(
        t.is_contiguous() and t.numel() == param.numel() for t in alike
    ):
        yield grad, param, state
        return
    splits = {name: torch.split(value.view(-1), BLOCK) for name, value in state.items()}
    pairs = zip(torch.split(grad.view(-1), BLOCK), torch.split(param.view(-1), BLOCK), strict=True)
    for i, (g, p) in enumerate(pairs):
        yield g, p, {name: split[i] for name, split in splits.items()}


@functools.lru_cache(maxsize=4096)
def _compiled(
    rule: Rule, layout: Layout, runs: int | None, phase: Phase, signature: object
) -> Kernel:
    """Return the compiled step of buckets of one signature (shape, dtype, device, count).

    Each signature gets a code object of its own, because torch keeps the compiled variants of one
    code object in one list that is searched at every call and limited in length.
    """
    eager = _eager(rule, layout, runs, phase)
    assert isinstance(eager, types.FunctionType)
    name = f"{type(rule).__name__.lower()}_{next(_serial)}"
    code = eager.__code__.replace(co_name=name)
    own = types.FunctionType(code, eager.__globals__, name, None, eager.__closure__)
    ways: list[Kernel] = [
        torch.compile(own, fullgraph=True, dynamic=False, options=options) for options in OPTIONS
    ]
    return _or_eager(ways, eager)


def _or_eager(ways: list[Kernel], eager: Kernel) -> Kernel:
    """Return a kernel that takes the first way that compiles, from its first call on, or none."""
    left = iter([*ways[1:], eager])
    chosen = ways[0]

    def run(inputs: Inputs, values: Tensor) -> dict[str, Tensor] | None:
        nonlocal chosen
        while True:
            try:
                return chosen(inputs, values)
            except COMPILE_ERRORS as error:
                chosen = next(left)
                if chosen is eager:
                    cause = str(error).strip().splitlines()[0]
                    _warn_once(
                        "Compiling failed, so optimizers run eagerly: same results, slower "
                        f"({cause})."
                    )

    return run


_serial = itertools.count()


def can_compile() -> bool:
    """Say whether torch.compile can work here; warn once if not."""
    if problem := compiler.problem():
        _warn_once(f"{problem} Optimizers run eagerly: same results, slower.")
    return not problem


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=3)
