"""How rules run: like parameters together, eager or compiled, lr and decay applied, in place."""

from __future__ import annotations

import functools
import itertools
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch._dynamo import exc as dynamo

from steepest import compiler
from steepest.optim.buckets import Bucket, Inputs, compute_dtype
from steepest.optim.rule import Layout, Rule, State, is_live

BLOCK = 1 << 18
"""Elements that an elementwise rule steps at a time when run eagerly on a CPU, so that the
temporaries of its dozen operations stay in the cache."""

COMPILE_ERRORS = (dynamo.TorchDynamoException, dynamo.FailOnRecompileLimitHit)

Phase = Literal["update", "start", "refresh"]

DIRECTION = "direction"
"""Key of the direction beside the new state, where a pure step returns both."""


Kernel = Callable[[Inputs, Tensor], None]
"""In place, from gathered inputs and packed live values: new states and new targets."""


def values_of(rule: Rule, group: Mapping[str, Any]) -> dict[str, Any]:
    """Return the live hyperparameters of a parameter group by name."""
    return {name: group[name] for name, v in rule.hyperparameters().items() if is_live(v)}


def with_scalars(
    rule: Rule, values: Mapping[str, Any], step: int, runs: int | None
) -> dict[str, Any]:
    """Return the live values and the rule's scalars at this step, per run where there are runs."""
    if runs is None:
        return {**values, **rule.scalars(step, values)}
    each = [
        rule.scalars(step, {name: _of_run(v, run) for name, v in values.items()})
        for run in range(runs)
    ]
    scalars = {name: torch.tensor([s[name] for s in each], dtype=torch.float64) for name in each[0]}
    return {**values, **scalars}


def _of_run(value: Any, run: int) -> Any:
    if isinstance(value, tuple):
        return tuple(_of_run(v, run) for v in value)
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
    """Return the in-place step of a bucket: the rule's `update`, `start` or `refresh`."""
    p = bucket.params[0]
    if not compile:
        return _eager(rule, layout, runs, phase, blocks=runs is None and p.device.type == "cpu")
    shapes = tuple((p.shape, p.stride()) for p in bucket.params)
    signature = (type(bucket), p.dtype, p.device, shapes, tuple(bucket.states[0]))
    return _compiled(rule, layout, runs, signature)


@functools.lru_cache(maxsize=4096)
def _eager(
    rule: Rule, layout: Layout, runs: int | None, phase: Phase, blocks: bool = False
) -> Kernel:
    def pure(grad: Tensor, param: Tensor, state: State, values: Tensor) -> State:
        h = layout.unpack(values)
        seen = param.to(compute_dtype(param.dtype))
        grad = grad.to(seen.dtype)
        if phase == "start":
            return rule.start(grad, seen, state, h)
        if phase == "refresh":
            return rule.refresh(grad, seen, state, h)
        direction, changed = rule.update(grad, seen, state, h)
        return {**changed, DIRECTION: direction}

    def apply(param: Tensor, direction: Tensor, values: Tensor) -> Tensor:
        wide = param.to(compute_dtype(param.dtype))
        return rule.apply(wide, direction, layout.unpack(values))

    one = pure if runs is None else torch.vmap(pure, in_dims=(0, 0, 0, 1))
    moved = apply if runs is None else torch.vmap(apply, in_dims=(0, 0, 1))

    def each(inputs: Inputs, v: Tensor) -> None:
        for grad, param, state in zip(*inputs[:3], strict=True):
            for g, p, s in _blocks(grad, param, state) if blocks else [(grad, param, state)]:
                new = one(g, p, s, v)
                if DIRECTION in new:
                    p.copy_(moved(p, new.pop(DIRECTION), v))
                _store(s, new)

    def together(inputs: Inputs, v: Tensor) -> None:
        (grads,), (seen,), (state,), targets = inputs
        new = torch.vmap(one, in_dims=(0, 0, 0, None))(grads, seen, state, v)
        if DIRECTION in new:
            for param, direction in zip(targets, new.pop(DIRECTION).unbind(0), strict=True):
                param.copy_(moved(param, direction, v))
        _store(state, new)

    return each if rule.elementwise else together


def _store(state: State, new: State) -> None:
    for name, value in new.items():
        state[name].copy_(value)


def _blocks(grad: Tensor, param: Tensor, state: State) -> Iterator[tuple[Tensor, Tensor, State]]:
    """Yield views of one parameter's tensors, small enough to stay in the cache."""
    if param.numel() <= BLOCK or not all(t.is_contiguous() for t in (grad, param, *state.values())):
        yield grad, param, state
        return
    splits = {name: torch.split(value.view(-1), BLOCK) for name, value in state.items()}
    pairs = zip(torch.split(grad.view(-1), BLOCK), torch.split(param.view(-1), BLOCK), strict=True)
    for i, (g, p) in enumerate(pairs):
        yield g, p, {name: split[i] for name, split in splits.items()}


@functools.lru_cache(maxsize=4096)
def _compiled(rule: Rule, layout: Layout, runs: int | None, signature: object) -> Kernel:
    """Return the compiled step of buckets of one signature (shape, dtype, device, count).

    Each signature gets a code object of its own, because torch keeps the compiled variants of one
    code object in one list that is searched at every call and limited in length.
    """
    eager = _eager(rule, layout, runs, "update")
    assert isinstance(eager, types.FunctionType)
    name = f"{type(rule).__name__.lower()}_{next(_serial)}"
    code = eager.__code__.replace(co_name=name)
    own = types.FunctionType(code, eager.__globals__, name, None, eager.__closure__)
    return _or_eager(torch.compile(own, fullgraph=True, dynamic=False), eager)


def _or_eager(fast: Kernel, eager: Kernel) -> Kernel:
    """Return a kernel that runs eagerly from the first call on where compiling fails."""
    chosen = fast

    def run(inputs: Inputs, values: Tensor) -> None:
        nonlocal chosen
        try:
            chosen(inputs, values)
        except COMPILE_ERRORS as error:
            cause = str(error).strip().splitlines()[0]
            _warn_once(
                f"Compiling failed, so optimizers run eagerly: same results, slower ({cause})."
            )
            chosen = eager
            eager(inputs, values)

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
