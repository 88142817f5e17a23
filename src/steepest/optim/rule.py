"""The one way to write an optimizer: a pure function of one parameter and its gradient."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from steepest.optim.live import Hyper

State = dict[str, Tensor]
"""What a rule remembers of one parameter, by name."""

Extra = Literal["sampled_labels", "previous_weights"]
"""A gradient beside the batch's own: of the loss on labels sampled from the model's predictions, or
of the same batch at the weights before the last step."""


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that rules see: at least float32, so that small updates are not lost."""
    return torch.promote_types(dtype, torch.float32)


def ema(average: Tensor, value: Tensor, beta: Tensor | float) -> Tensor:
    """Return beta * average + (1 - beta) * value, the exponential moving average after `value`."""
    moved: Tensor = average + (1 - beta) * (value - average)
    return moved


def sign(x: Tensor) -> Tensor:
    """Return the sign of each element, NaN where x is not finite (torch.sign hides NaN as 0)."""
    signs: Tensor = torch.sign(x) + (x - x)  # Half the time of a comparison with NaN.
    return signs


def one_of(*values: str) -> Any:
    """Return a rule's field that holds one of these texts, the first by default."""
    return dataclasses.field(default=values[0], metadata={"choices": values})


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

    whole: ClassVar[bool] = False
    """Its state is laid out by whole tensors, which are neither joined nor sharded."""

    reads_param: ClassVar[bool] = True
    """`update` reads the parameter's values. Where False it gets NaN, and no copy is made."""

    least_ndim: ClassVar[int] = 0
    """Fewest dimensions that the rule can step."""

    splits: ClassVar[bool] = False
    """Fused matrices (query, key and value in one) are stepped block by block."""

    draws: ClassVar[bool] = False
    """The rule uses random numbers: its state holds "key" and `h` the `step`, from which
    `steepest.optim.random.fold(state["key"], h.step)` makes the key of a step."""

    rounds_to_int8: ClassVar[bool] = False
    """`move` of an `Int8Weight` returns one (see `steepest.int8_weights`). Wrappers do not."""

    averages: ClassVar[bool] = False
    """Evaluation uses other weights than training: those that `average` returns."""

    fixed: ClassVar[frozenset[str]] = frozenset()
    """Float hyperparameters that are static although they are floats: read them from `self`. For
    what decides at which steps work is done."""

    total_steps: ClassVar[frozenset[str]] = frozenset()
    """Hyperparameters that are to be as long as the training, which the rule cannot know: None by
    default, and the total number of steps where a training loop fills them in."""

    keeps_gradient: ClassVar[bool] = False
    """The gradient's buffer is the state: `update` returns what stays in it as "grad", to which new
    gradients are added."""

    def init(self, param: Tensor) -> State:
        """Return the state of a parameter that has not been stepped."""
        raise NotImplementedError

    def scalars(self, step: int, values: Mapping[str, Any]) -> dict[str, float]:
        """Return what depends on the step count (from 1), computed on the host in float64.

        `values` holds the live hyperparameters and the memory as Python floats. Bias corrections
        and step-dependent averages belong here; they reach `update` as attributes of `h`.
        """
        return {}

    def memory(self) -> dict[str, float]:
        """Return the numbers that a parameter's history of steps adds up to, before any step.

        For what depends on past values of the hyperparameters, such as the sum of past learning
        rates: they are kept on the host beside the step count.
        """
        return {}

    def remember(self, step: int, values: Mapping[str, Any]) -> dict[str, float]:
        """Return the memory that this step (from 1) sees; `values` holds the memory before it."""
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

    def move(
        self, param: Tensor, direction: Tensor, state: State, h: Hyper
    ) -> tuple[Tensor, State]:
        """Return the new parameter and the state entries that changed by moving it.

        Unlike elsewhere `param` has its own dtype. Override where storing the parameter is part
        of the method (rounding, slow weights); `state` is the one after `update`.
        """
        return self.apply(param.to(compute_dtype(param.dtype)), direction, h), {}

    def starts(self) -> bool:
        """Say whether the first step of a parameter calls `start` instead of `update`."""
        return False

    def start(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> State:
        """Return the state entries after a first step that sets state up and moves no weight."""
        raise NotImplementedError

    def prepares(self, step: int) -> bool:
        """Say whether `prepare` is due before this step (from 1) of a parameter."""
        return False

    def due(self, state: State, h: Hyper) -> Tensor:
        """Say, as bool `[]`, whether a `prepare` is due for this parameter, if not for all."""
        raise NotImplementedError

    def prepare(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> State:
        """Return the state entries renewed before `update`, with the gradient it will see.

        Like `refresh` it runs eagerly.
        """
        raise NotImplementedError

    def refreshes(self, step: int) -> bool:
        """Say whether `refresh` is due after this step (from 1) of a parameter."""
        return False

    def refresh(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> State:
        """Return the state entries renewed by the expensive work done every n steps.

        Runs eagerly after `update`, so it may use decompositions that do not compile.
        """
        raise NotImplementedError

    def shared(self) -> dict[str, float]:
        """Return the values that all parameters of the optimizer share, before any step.

        They reach `update` as attributes of `h`, renewed by `combine` before every step.
        """
        return {}

    def measures(self, step: int) -> bool:
        """Say whether `measure` is due before this step (from 1) of a parameter."""
        return True

    def measure(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> dict[str, Tensor]:
        """Return what is put together over all parameters before the step.

        0-d partial sums are added up. 1-D values are put end to end, any number from a parameter:
        for medians, of rules that are not elementwise.
        """
        raise NotImplementedError

    def combine(self, sums: Mapping[str, Tensor], h: Hyper) -> dict[str, Tensor]:
        """Return the new shared values, 0-d, from what was measured; `h` holds the old ones."""
        raise NotImplementedError

    def extra(self) -> Extra | None:
        """Return the extra gradient that `observe` is given before some steps, if there is one.

        A rule that wants "previous_weights" keeps the weights before its last step in the state as
        "previous_param".
        """
        return None

    def wants(self, step: int) -> bool:
        """Say whether `observe` must be given the extra gradient before this step (from 1)."""
        return True

    def observe(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> State:
        """Return the state entries renewed by the extra gradient.

        `h.batch_tokens` is the number of tokens that its loss is the mean of.
        """
        raise NotImplementedError

    def average(self, param: Tensor, state: State, h: Hyper) -> Tensor:
        """Return the weights to evaluate with, from the training weights."""
        raise NotImplementedError

    def hyperparameters(self) -> dict[str, Any]:
        """Return every hyperparameter by name, `lr` and `weight_decay` first."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    def choices(self, name: str) -> tuple[str, ...]:
        """Return the values that a field made by `one_of` may have, () for any other."""
        field = type(self).__dataclass_fields__.get(name)
        found: tuple[str, ...] = field.metadata.get("choices", ()) if field else ()
        return found

    def replace(self, **values: Any) -> Self:
        """Return the rule with some hyperparameters changed."""
        return dataclasses.replace(self, **values)
