"""Rules around other rules."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import Tensor

from steepest.errors import UserError
from steepest.optim.live import Hyper
from steepest.optim.rule import Extra, Rule, State


@dataclass(frozen=True)
class Wrapper(Rule):
    """A rule around another: it sees the inner rule's direction before lr and decay.

    Its hyperparameters and state are its own plus those of the inner rule, in one namespace: an own
    hyperparameter whose name the inner rule has is called <prefix>_<name>, and `own` finds the live
    value of either. It is what the inner rule is, and its own class variables add to that, but it
    is elementwise only if both are. What it does not override, it does as the inner rule.
    """

    lr: float = dataclasses.field(init=False, repr=False, default=0.0)
    weight_decay: float = dataclasses.field(init=False, repr=False, default=0.0)
    inner: Rule = dataclasses.field(kw_only=True)

    INHERITED: ClassVar[tuple[str, ...]] = ("lr", "weight_decay", "inner")
    """Fields that are no hyperparameters of its own."""

    prefix: ClassVar[str] = ""
    stores: ClassVar[bool] = False
    """It decides how the parameter is stored, so that nothing goes around it."""

    sees_gradient: ClassVar[bool] = False
    """It looks at the gradient of a step, which must be the new one alone."""

    everywhere: ClassVar[bool] = False
    """`create` puts it around the rules of all roles, not around the method's own alone."""

    reads_param: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Take over what the inner rule is. Raises UserError where it can't go around it."""
        own, inner = type(self), self.inner
        if own.sees_gradient and inner.keeps_gradient:
            raise UserError(
                f"{self.prefix} looks at new gradients, but {type(inner).__name__} has them added "
                "to those before."
            )
        around: Rule = inner
        while isinstance(around, Wrapper):
            if around.stores:
                raise UserError(f"{around.prefix} decides what is stored; name it last, and alone.")
            if type(around) is own:
                raise UserError(f"{self.prefix or own.__name__} is around the rule already.")
            around = around.inner
        either = ("reads_param", "draws", "averages", "splits", "whole", "keeps_gradient")
        traits: dict[str, Any] = {n: getattr(own, n) or getattr(inner, n) for n in either}
        traits["elementwise"] = own.elementwise and inner.elementwise
        traits["least_ndim"] = max(own.least_ndim, inner.least_ndim)
        traits["fixed"] = own.fixed | inner.fixed
        for name, value in traits.items():
            object.__setattr__(self, name, value)

    def init(self, param: Tensor) -> State:
        """Do as the inner rule."""
        return self.inner.init(param)

    def update(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> tuple[Tensor, State]:
        """Do as the inner rule."""
        return self.inner.update(grad, param, state, h)

    def scalars(self, step: int, values: Mapping[str, Any]) -> dict[str, float]:
        """Do as the inner rule."""
        return self.inner.scalars(step, values)

    def apply(self, param: Tensor, direction: Tensor, h: Hyper) -> Tensor:
        """Do as the inner rule."""
        return self.inner.apply(param, direction, h)

    def move(
        self, param: Tensor, direction: Tensor, state: State, h: Hyper
    ) -> tuple[Tensor, State]:
        """Do as the inner rule."""
        return self.inner.move(param, direction, state, h)

    def starts(self) -> bool:
        """Do as the inner rule."""
        return self.inner.starts()

    def start(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> State:
        """Do as the inner rule."""
        return self.inner.start(grad, param, state, h)

    def prepares(self, step: int) -> bool:
        """Do as the inner rule."""
        return self.inner.prepares(step)

    def due(self, state: State, h: Hyper) -> Tensor:
        """Do as the inner rule."""
        return self.inner.due(state, h)

    def prepare(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> State:
        """Do as the inner rule."""
        return self.inner.prepare(grad, param, state, h)

    def refreshes(self, step: int) -> bool:
        """Do as the inner rule."""
        return self.inner.refreshes(step)

    def refresh(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> State:
        """Do as the inner rule."""
        return self.inner.refresh(grad, param, state, h)

    def shared(self) -> dict[str, float]:
        """Do as the inner rule."""
        return self.inner.shared()

    def measures(self, step: int) -> bool:
        """Do as the inner rule."""
        return self.inner.measures(step)

    def measure(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> dict[str, Tensor]:
        """Do as the inner rule."""
        return self.inner.measure(grad, param, state, h)

    def combine(self, sums: Mapping[str, Tensor], h: Hyper) -> dict[str, Tensor]:
        """Do as the inner rule."""
        return self.inner.combine(sums, h)

    def memory(self) -> dict[str, float]:
        """Do as the inner rule."""
        return self.inner.memory()

    def remember(self, step: int, values: Mapping[str, Any]) -> dict[str, float]:
        """Do as the inner rule."""
        return self.inner.remember(step, values)

    def extra(self) -> Extra | None:
        """Do as the inner rule."""
        return self.inner.extra()

    def wants(self, step: int) -> bool:
        """Do as the inner rule."""
        return self.inner.wants(step)

    def observe(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> State:
        """Do as the inner rule."""
        return self.inner.observe(grad, param, state, h)

    def average(self, param: Tensor, state: State, h: Hyper) -> Tensor:
        """Do as the inner rule."""
        return self.inner.average(param, state, h)

    def own(self, h: Hyper, name: str) -> Any:
        """Return the live value of a hyperparameter of the wrapper's own."""
        return getattr(h, next(shown for shown, field in self.own_names().items() if field == name))

    def own_names(self) -> dict[str, str]:
        """Return the wrapper's own fields by the names of their hyperparameters."""
        theirs = self.inner.hyperparameters()
        found = {}
        for field in dataclasses.fields(self):
            if field.name not in self.INHERITED:
                name = field.name
                while name in theirs:
                    name = f"{self.prefix}_{name}"
                found[name] = field.name
        return found

    def hyperparameters(self) -> dict[str, Any]:
        """Return the inner rule's hyperparameters, then the wrapper's own."""
        own = {name: getattr(self, field) for name, field in self.own_names().items()}
        return self.inner.hyperparameters() | own

    def choices(self, name: str) -> tuple[str, ...]:
        """Return what its own or its inner rule's field may be."""
        own = self.own_names()
        return super().choices(own[name]) if name in own else self.inner.choices(name)

    def replace(self, **values: Any) -> Self:
        """Return the wrapper with its own and its inner rule's hyperparameters changed."""
        own = {
            field: values.pop(name) for name, field in self.own_names().items() if name in values
        }
        return dataclasses.replace(self, inner=self.inner.replace(**values), **own)


def overrides(rule: Rule, method: str) -> bool:
    """Say whether a rule, or one that it wraps, does its own work under this name."""
    while isinstance(rule, Wrapper):
        if getattr(type(rule), method) is not getattr(Wrapper, method):
            return True
        rule = rule.inner
    return getattr(type(rule), method) is not getattr(Rule, method)
