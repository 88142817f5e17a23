"""An optimizer beside its reference: same gradients, same learning rates, same extra gradients.

References get the hyperparameters that the optimizer's parameter groups show, so that a case says
only what it changes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from references import find
from references.base import Array, GroupReference, Reference
from torch import Tensor, nn

import steepest
from steepest.optim import random

TOKENS = 24
"""What extra gradients on sampled labels are said to be means over."""

Hook = Callable[[Any, dict[str, Any], int], None]
"""(reference, the parameter's state after this step, step from 1)."""
Shapes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Case:
    """Hyperparameters under which an optimizer is held against its reference."""

    name: str
    hyper: dict[str, Any] = field(default_factory=dict)
    label: str = ""
    """What is special, for a second case of the same name."""
    wrap: tuple[str, ...] = ()
    decay: float = 0.1
    """Weight decay of the runs that have any; None where the method takes none."""
    tolerance32: float = 1e-5
    tolerance64: float = 1e-9
    margin32: float = 1e-5
    """Least margin of an element that float32 must decide as float64 does (see `margins`)."""
    reason: str = ""
    """Why a tolerance is larger: what the method's arithmetic magnifies."""
    before: Hook | None = None
    """Called after the optimizer's step and before the reference's."""
    after: Hook | None = None
    """Called after both."""
    shapes: Shapes | None = None
    """Shapes of the fixed gradients, where not every shape is meant."""
    model: bool = True
    """Whether it also trains the LLaMA."""

    def __str__(self) -> str:
        return " ".join(filter(None, (*self.wrap, self.name, self.label)))


@dataclass(frozen=True)
class Oracle:
    """An independent implementation and where it agrees."""

    name: str
    package: str
    """Distribution on PyPI, whose version the table shows."""
    make: Callable[..., torch.optim.Optimizer]
    """Called with parameters and hyperparameters under our names."""
    shapes: Shapes
    hyper: dict[str, Any]
    tolerance32: float = 1e-5
    tolerance64: float = 1e-12
    observe: Callable[[Any], None] | None = None
    """Has it take the gradients that are there as the extra ones that `optimizer.wants` names."""
    schedule: bool = True
    """Whether it agrees under a changing learning rate."""
    role: str | None = None
    """Role of all parameters, for optimizers that ask."""
    difference: str = ""
    """What had to be set, or left out, for the two to mean the same."""
    label: str = ""
    wrap: tuple[str, ...] = ()

    def __str__(self) -> str:
        return " ".join(filter(None, (*self.wrap, self.name, self.package, self.label)))


class Followed:
    """The references of all parameters of an optimizer."""

    def __init__(self, case: Case, optimizer: steepest.Optimizer) -> None:
        self.case, self.optimizer = case, optimizer
        self.t = 0
        self.single: dict[Tensor, Reference] = {}
        self.grouped: list[tuple[list[Tensor], GroupReference]] = []
        self.lrs: dict[Tensor, float] = {}
        together: dict[str, list[tuple[Tensor, dict[str, Any]]]] = {}
        for group in optimizer.param_groups:
            together.setdefault(group["rule"], []).extend((p, group) for p in group["params"])
        for label, members in together.items():
            self._follow("adamw" if label == "adamw" else case.name, members)

    def _follow(self, name: str, members: list[tuple[Tensor, dict[str, Any]]]) -> None:
        wrap = self.case.wrap if name == self.case.name else ()
        kind = find(name, wrap)
        if kind.group:
            group = members[0][1]
            starts = [_array(p) for p, _ in members]
            decays = [g["weight_decay"] for _, g in members]
            made = kind(starts, weight_decays=decays, **_hyper(kind, group), draw=None)
            self.grouped.append(([p for p, _ in members], made))
            return
        for p, group in members:
            self.single[p] = kind(
                _array(p),
                weight_decay=group["weight_decay"],
                draw=self._draw(p),
                **_hyper(kind, group),
            )

    def _draw(self, p: Tensor) -> Callable[[str, int, tuple[int, ...]], Array]:
        def draw(kind: str, step: int, shape: tuple[int, ...]) -> Array:
            key = random.fold(self.optimizer.state[p]["key"], step)
            numbers: Tensor = getattr(random, kind)(key, shape, torch.float64)
            return numbers.numpy()

        return draw

    def read_lrs(self) -> None:
        """Note the learning rates of the coming step."""
        self.lrs = {p: g["lr"] for g in self.optimizer.param_groups for p in g["params"]}

    def observe(
        self, grads: Sequence[Tensor | None], params: Sequence[Tensor], tokens: int
    ) -> None:
        """Give the references the extra gradient that the optimizer observes."""
        for p, g in zip(params, grads, strict=True):
            reference = self.single.get(p)
            if g is not None and reference is not None and hasattr(reference, "observe"):
                takes = len(inspect.signature(reference.observe).parameters)
                reference.observe(*(g.double().numpy(), tokens)[:takes])

    def step(self, grads: dict[Tensor, Tensor]) -> None:
        """Step every reference; the optimizer has stepped already."""
        self.t += 1
        for p, reference in self.single.items():
            if self.case.before is not None and type(reference).__name__ != "AdamW":
                self.case.before(reference, self.optimizer.state[p], self.t)
            reference.step(grads[p].detach().double().numpy(), self.lrs[p])
            if self.case.after is not None and type(reference).__name__ != "AdamW":
                self.case.after(reference, self.optimizer.state[p], self.t)
        for params, group in self.grouped:
            group.step([grads[p].detach().double().numpy() for p in params], self.lrs[params[0]])

    def values(self) -> dict[Tensor, Array]:
        """Return the references' parameters."""
        found = {p: reference.x for p, reference in self.single.items()}
        for params, group in self.grouped:
            found |= dict(zip(params, group.xs, strict=True))
        return found

    def averages(self) -> dict[Tensor, Array]:
        """Return the references' evaluation weights."""
        return {
            p: reference.average() if hasattr(reference, "average") else reference.x
            for p, reference in self.single.items()
        }

    def margins(self) -> dict[Tensor, Array]:
        """Return how decidable the signs were that sign methods took."""
        return {p: r.margin for p, r in self.single.items() if hasattr(r, "margin")}


def _array(p: Tensor) -> Array:
    return p.detach().double().numpy().copy()


def _hyper(kind: type[Any], group: dict[str, Any]) -> dict[str, Any]:
    """Return the group's values of what the reference's `setup` takes."""
    names = inspect.signature(kind.setup).parameters
    return {name: group[name] for name in names if name in group}


def make(
    case: Case, params: nn.Module | Sequence[dict[str, Any]], decay: float, dtype: torch.dtype
) -> steepest.Optimizer:
    """Return the optimizer of a case, Newton-Schulz products in the dtype of the comparison."""
    hyper = {"weight_decay": decay, **case.hyper}
    known = steepest.describe(case.name).hyperparameters
    if "ns_dtype" in known:
        hyper.setdefault("ns_dtype", str(dtype).removeprefix("torch."))
    if "adam_lr" in known:
        hyper = {"adam_lr": 3e-3, "adam_weight_decay": decay, **hyper}
    return steepest.create(case.name, params, wrap=case.wrap, compile=False, **hyper)


def snapshot(params: Sequence[Tensor]) -> dict[Tensor, Array]:
    """Return copies of parameters in float64."""
    return {p: np.array(_array(p)) for p in params}
