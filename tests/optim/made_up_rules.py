"""Rules made up to try what rules may ask of the engine beside gradients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import problems
import torch
from torch import Tensor, nn

import steepest
from steepest.optim import Hyper, Rule, State, Wrapper
from steepest.optim.rule import Extra

SHAPES = ((4, 3), (4, 3), (5,), ())


@dataclass(frozen=True)
class Normed(Rule):
    """Divides by the norm of all gradients together."""

    lr: float = 0.1
    elementwise: ClassVar[bool] = True

    def init(self, param: Tensor) -> State:
        return {}

    def shared(self) -> dict[str, float]:
        return {"norm": 0.0, "calls": 0.0}

    def measure(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> dict[str, Tensor]:
        return {"squares": (grad * grad).sum()}

    def combine(self, sums: Mapping[str, Tensor], h: Hyper) -> dict[str, Tensor]:
        return {"norm": sums["squares"].sqrt(), "calls": h.calls + 1}

    def update(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> tuple[Tensor, State]:
        return grad / h.norm * h.calls, {}


@dataclass(frozen=True)
class ByMedian(Rule):
    """Divides by the median of all gradients of matrices, found at every other step."""

    lr: float = 0.1

    def init(self, param: Tensor) -> State:
        return {}

    def shared(self) -> dict[str, float]:
        return {"median": 1.0, "count": 0.0}

    def measures(self, step: int) -> bool:
        return step % 2 == 0

    def measure(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> dict[str, Tensor]:
        found = grad.abs().flatten() if grad.ndim > 1 else grad.new_zeros(0)
        return {"all": found, "count": torch.ones_like(grad).sum()}

    def combine(self, sums: Mapping[str, Tensor], h: Hyper) -> dict[str, Tensor]:
        return {"median": sums["all"].median(-1).values.double(), "count": sums["count"]}

    def update(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> tuple[Tensor, State]:
        return grad / h.median, {}


@dataclass(frozen=True)
class Remembering(Rule):
    """Steps by the sum of the learning rates so far."""

    lr: float = 0.1
    elementwise: ClassVar[bool] = True

    def init(self, param: Tensor) -> State:
        return {}

    def memory(self) -> dict[str, float]:
        return {"lr_sum": 0.0}

    def remember(self, step: int, values: Mapping[str, Any]) -> dict[str, float]:
        return {"lr_sum": values["lr_sum"] + values["lr"]}

    def update(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> tuple[Tensor, State]:
        return h.lr_sum * torch.ones_like(grad), {}

    def apply(self, param: Tensor, direction: Tensor, h: Hyper) -> Tensor:
        moved: Tensor = param - direction
        return moved


@dataclass(frozen=True)
class Observing(Rule):
    """Steps along an extra gradient, renewed at every other step."""

    lr: float = 1.0
    kind: str = "sampled_labels"

    def init(self, param: Tensor) -> State:
        return {"seen": torch.zeros_like(param), "previous_param": torch.zeros_like(param)}

    def extra(self) -> Extra:
        return self.kind  # type: ignore[return-value]

    def wants(self, step: int) -> bool:
        return step % 2 == 0

    def observe(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> State:
        return {"seen": grad * h.batch_tokens}

    def update(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> tuple[Tensor, State]:
        return state["seen"], {"previous_param": param}


@dataclass(frozen=True)
class Averaging(Rule):
    """Evaluates the mean of the weights and zero."""

    lr: float = 0.1
    averages: ClassVar[bool] = True

    def init(self, param: Tensor) -> State:
        return {}

    def update(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> tuple[Tensor, State]:
        return grad, {}

    def average(self, param: Tensor, state: State, h: Hyper) -> Tensor:
        return param / 2


@dataclass(frozen=True)
class Halving(Rule):
    """Steps along the sum of gradients, each half as large as the next, which it keeps in them."""

    lr: float = 0.1
    keeps_gradient: ClassVar[bool] = True

    def init(self, param: Tensor) -> State:
        return {}

    def update(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> tuple[Tensor, State]:
        return grad, {"grad": grad / 2}


@dataclass(frozen=True)
class Delayed(Rule):
    """Steps along the gradient of two steps ago."""

    lr: float = 0.1

    def init(self, param: Tensor) -> State:
        return {"last": torch.zeros_like(param), "before": torch.zeros_like(param)}

    def update(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> tuple[Tensor, State]:
        return state["before"], {"last": grad, "before": state["last"]}


@dataclass(frozen=True)
class Counting(Wrapper):
    """Counts steps where parameters are stored, and prepares the state before each."""

    def init(self, param: Tensor) -> State:
        return {
            **self.inner.init(param),
            "count": param.new_zeros(()),
            "ready": param.new_zeros(()),
        }

    def prepares(self, step: int) -> bool:
        return step == 2

    def prepare(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> State:
        return {"ready": grad.sum()}

    def move(
        self, param: Tensor, direction: Tensor, state: State, h: Hyper
    ) -> tuple[Tensor, State]:
        new, changed = self.inner.move(param, direction, state, h)
        return new, {**changed, "count": state["count"] + 1}


def stepped(optimizer: steepest.Optimizer, params: list[nn.Parameter], steps: range) -> None:
    for step, grads in enumerate(problems.stream(steps.stop, SHAPES)):
        if step in steps:
            problems.set_gradients(params, grads)
            optimizer.step()
