"""The one way to write an optimizer: a pure function of one parameter and its gradient."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

State = dict[str, Tensor]
"""What a rule remembers of one parameter, by name."""

Value = float | tuple[float, ...] | Tensor
"""A live hyperparameter: a number, a tuple of numbers, or one number per run (1-D float64)."""


class Hyper:
    """The values that may change from step to step or differ between runs, as 0-d tensors.

    Every float hyperparameter of the rule is an attribute under its own name (`h.lr`, `h.betas`),
    beside what `Rule.scalars` returns. They are float64, so that `1 - h.betas[1]` keeps its digits;
    multiplying a float32 tensor by one gives float32.
    """

    def __init__(self, values: Mapping[str, Tensor | tuple[Tensor, ...]]) -> None:
        for name, value in values.items():
            setattr(self, name, value)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"The rule has no hyperparameter or scalar named {name!r}.")


def ema(average: Tensor, value: Tensor, beta: Tensor | float) -> Tensor:
    """Return beta * average + (1 - beta) * value, the exponential moving average after `value`."""
    moved: Tensor = average + (1 - beta) * (value - average)
    return moved


@dataclass(frozen=True)
class Rule:
    """An optimizer's update of one parameter in its natural shape.

    Sub-classes are frozen dataclasses: their fields are the hyperparameters with the paper's
    defaults. Float fields (and tuples of floats) are *live*: the engine passes their current
    values in `h`, so schedules and sweeps need no recompilation. Fields of any other type, and
    None, are *static*: read them from `self`.

    `update` is pure: no in-place writes, no `.item()`, no branching on values, no randomness from
    global state. It sees gradient, parameter and state in float32 (float64 for float64
    parameters) whatever the parameter's dtype. Branching on shapes and static fields is fine.
    """

    lr: float
    weight_decay: float = 0.0

    elementwise: ClassVar[bool] = False
    """Each element is updated from its own gradient and state alone, so shape does not matter."""

    reads_param: ClassVar[bool] = True
    """`update` reads the parameter's values. Where False it gets NaN in the parameter's shape, and
    the engine saves a copy of the parameters."""

    least_ndim: ClassVar[int] = 0
    """Fewest dimensions that the rule can step."""

    def init(self, param: Tensor) -> State:
        """Return the state of a parameter that has not been stepped."""
        raise NotImplementedError

    def scalars(self, step: int, values: Mapping[str, Any]) -> dict[str, float]:
        """Return what depends on the step count (from 1), computed on the host in float64.

        `values` holds the live hyperparameters as Python floats. Bias corrections and
        step-dependent averages belong here; they reach `update` as attributes of `h`.
        """
        return {}

    def update(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> tuple[Tensor, State]:
        """Return the direction (same shape as `param`) and the state entries that changed."""
        raise NotImplementedError

    def apply(self, param: Tensor, direction: Tensor, h: Hyper) -> Tensor:
        """Return the new parameter: a step of `lr` along `-direction`, with decoupled decay.

        Override only where the method's own decay or step is part of its formula.
        """
        moved: Tensor = param - h.lr * (direction + h.weight_decay * param)
        return moved

    def starts(self) -> bool:
        """Say whether the first step of a parameter calls `start` instead of `update`."""
        return False

    def start(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> State:
        """Return the state entries after a first step that sets state up and moves no weight."""
        raise NotImplementedError

    def refreshes(self, step: int) -> bool:
        """Say whether `refresh` is due after this step (from 1) of a parameter."""
        return False

    def refresh(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> State:
        """Return the state entries renewed by the expensive work done every n steps.

        Runs eagerly after `update`, so it may use decompositions that do not compile.
        """
        raise NotImplementedError

    def hyperparameters(self) -> dict[str, Any]:
        """Return every hyperparameter by name, `lr` and `weight_decay` first."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    def replace(self, **values: Any) -> Self:
        """Return the rule with some hyperparameters changed."""
        return dataclasses.replace(self, **values)


@dataclass(frozen=True)
class Wrapper(Rule):
    """A rule around another: it sees the inner rule's direction before lr and decay.

    Its hyperparameters and state are its own plus those of the inner rule, in one namespace.
    """

    lr: float = dataclasses.field(init=False, repr=False, default=0.0)
    weight_decay: float = dataclasses.field(init=False, repr=False, default=0.0)
    inner: Rule = dataclasses.field(kw_only=True)

    def init(self, param: Tensor) -> State:
        """Return the inner rule's state."""
        return self.inner.init(param)

    def scalars(self, step: int, values: Mapping[str, Any]) -> dict[str, float]:
        """Return the inner rule's scalars."""
        return self.inner.scalars(step, values)

    def apply(self, param: Tensor, direction: Tensor, h: Hyper) -> Tensor:
        """Step as the inner rule does."""
        return self.inner.apply(param, direction, h)

    def starts(self) -> bool:
        """Start as the inner rule does."""
        return self.inner.starts()

    def start(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> State:
        """Start as the inner rule does."""
        return self.inner.start(grad, param, state, h)

    def refreshes(self, step: int) -> bool:
        """Refresh when the inner rule does."""
        return self.inner.refreshes(step)

    def refresh(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> State:
        """Refresh what the inner rule refreshes."""
        return self.inner.refresh(grad, param, state, h)

    def _own(self) -> list[str]:
        return [
            f.name
            for f in dataclasses.fields(self)
            if f.name not in ("lr", "weight_decay", "inner")
        ]

    def hyperparameters(self) -> dict[str, Any]:
        """Return the inner rule's hyperparameters, then the wrapper's own."""
        return self.inner.hyperparameters() | {name: getattr(self, name) for name in self._own()}

    def replace(self, **values: Any) -> Self:
        """Return the wrapper with its own and its inner rule's hyperparameters changed."""
        own = {name: values.pop(name) for name in self._own() if name in values}
        return dataclasses.replace(self, inner=self.inner.replace(**values), **own)


def is_live(value: object) -> bool:
    """Say whether a hyperparameter value reaches `update` through `h` rather than `self`."""
    if isinstance(value, tuple):
        return bool(value) and all(isinstance(v, (float, Tensor)) for v in value)
    return isinstance(value, (float, Tensor))


@dataclass(frozen=True)
class Layout:
    """Where each live value sits in the one float64 vector that a step sends to the device."""

    entries: tuple[tuple[str, int], ...]
    """Names with the length of a tuple value, or -1 for a single number."""

    @classmethod
    def of(cls, values: Mapping[str, Value]) -> Layout:
        """Return the layout of these values."""
        return cls(tuple((k, len(v) if isinstance(v, tuple) else -1) for k, v in values.items()))

    def pack(self, values: Mapping[str, Value], runs: int | None) -> Tensor:
        """Return the values as float64 `[n]`, or `[n, runs]` when there are runs."""
        flat: list[float | Tensor] = []
        for name, length in self.entries:
            value = values[name]
            flat.extend(value if length >= 0 and isinstance(value, tuple) else [value])  # type: ignore[list-item]
        if runs is None:
            return torch.tensor(flat, dtype=torch.float64)
        return torch.stack([torch.as_tensor(v, dtype=torch.float64).expand(runs) for v in flat])

    def unpack(self, vector: Tensor) -> Hyper:
        """Return the values of a vector `[n]` as 0-d tensors."""
        scalars = vector.unbind(0)
        values: dict[str, Tensor | tuple[Tensor, ...]] = {}
        at = 0
        for name, length in self.entries:
            if length < 0:
                values[name] = scalars[at]
                at += 1
            else:
                values[name] = scalars[at : at + length]
                at += length
        return Hyper(values)
