"""Parameter groups and their rules: made, planned, saved and loaded."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from steepest.errors import UserError, unknown
from steepest.optim import hyperparameters, random, stepping
from steepest.optim.hyperparameters import hashable
from steepest.optim.int8 import check_steps
from steepest.optim.kept import KeptGradients
from steepest.optim.pieces import copy_to
from steepest.optim.plan import OBSERVED, Plan
from steepest.optim.roles import check_split
from steepest.optim.rule import Rule
from steepest.optim.wrapper import overrides

COMPILE_ELEMENTS = 4_000_000
"""With compile="auto", parameters below this many elements run eagerly: a step takes less time
than compiling could win back in a short run."""

EVALUATING = "evaluating"
"""Key of parameter groups whose rule averages: whether the evaluation weights are in place."""

SKIPPED = "skipped_steps"
"""Key of the first parameter group: how many steps were skipped for their gradients."""

RESERVED = frozenset(
    {
        "params",
        "param_names",
        "rule",
        "role",
        "initial_lr",
        "name",
        "shared",
        "split",
        "transposed",
        "bank",
        EVALUATING,
        OBSERVED,
        SKIPPED,
    }
)

KEPT = "kept_gradient"
"""Name, in a saved state, of a gradient that is state."""

HELD = "training_param"
"""Name, in a state saved in evaluation mode, of the weights that `train` brings back."""

OWN_ATTRIBUTES = (
    "rules",
    "runs",
    "compile",
    "seed",
    "nonfinite",
    "_held",
    "_kept",
)
"""What a copy or a pickle keeps beside what torch's own optimizers have."""


class RuledGroups(torch.optim.Optimizer):
    """Parameter groups, each stepped by a rule, with the state that the rules keep."""

    def __init__(
        self,
        groups: list[dict[str, Any]],
        rules: Mapping[str, Rule],
        *,
        runs: int | None = None,
        compile: bool | Literal["auto"] = "auto",
        seed: int = 0,
        nonfinite: Literal["propagate", "skip", "raise"] = "propagate",
    ) -> None:
        self.rules = dict(rules)
        self.runs = runs
        self.compile = compile
        self.seed = seed
        self.nonfinite = nonfinite
        self._held: dict[Tensor, Tensor] = {}
        self._kept = KeptGradients()
        # Changed in place, not set: Lightning calls methods on a wrapper that shares attributes.
        self._made: list[Plan] = []
        if compile not in (True, False, "auto"):
            raise UserError(f"compile is {compile!r}; it must be True, False or 'auto'.")
        if nonfinite not in ("propagate", "skip", "raise"):
            raise UserError(f"nonfinite is {nonfinite!r}; it must be propagate, skip or raise.")
        super().__init__(groups, {})
        if nonfinite == "skip":  # A distributed checkpoint loads what is there.
            self.param_groups[0][SKIPPED] = 0
        common = set.intersection(*(set(rule.hyperparameters()) for rule in self.rules.values()))
        first = next(iter(self.rules.values())).hyperparameters()
        self.defaults = {name: value for name, value in first.items() if name in common}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, with `"rule"` naming one of `rules` where there are several."""
        name = param_group.setdefault("rule", next(iter(self.rules)))
        if name not in self.rules:
            raise unknown("rule", str(name), self.rules)
        defaults = self.rules[name].hyperparameters()
        for key in param_group:
            if key not in defaults and key not in RESERVED:
                raise TypeError(str(unknown(f"hyperparameter of {name}", key, defaults)))
        self._normalise(param_group)
        check_split(param_group.get("split"))
        if self.rules[name].averages:
            param_group[EVALUATING] = False
        if overrides(self.rules[name], "extra"):
            param_group[OBSERVED] = False
        super().add_param_group(param_group)
        try:
            self._check_shapes(self.param_groups[-1])
        except UserError:
            del self.param_groups[-1]
            raise
        self._made.clear()

    def _normalise(self, group: dict[str, Any]) -> None:
        name = group["rule"]
        rule = self.rules[name]
        for key, default in rule.hyperparameters().items():
            value, choices = group.get(key, default), rule.choices(key)
            group[key] = hyperparameters.normal(
                name, key, value, default, self.runs, choices=choices
            )

    def _check_shapes(self, group: dict[str, Any]) -> None:
        rule = self.rules[group["rule"]]
        for p in group["params"]:
            shape = tuple(p.shape)
            check_steps(group["rule"], rule, group, p, self.runs)
            if self.runs is not None and (not shape or shape[0] != self.runs):
                raise UserError(
                    f"With runs={self.runs} every parameter needs a leading dimension of "
                    f"{self.runs}, but one has shape {shape}."
                )
            if p.ndim - (self.runs is not None) < rule.least_ndim:
                raise UserError(
                    f"{group['rule']} steps parameters of at least {rule.least_ndim} dimensions, "
                    f"but one has shape {shape}; give it the role 'vector'."
                )

    def _plans(self) -> list[Plan]:
        """Return how the groups are stepped, made anew where values no longer allow it."""
        planned = {id(group) for plan in self._made for group in plan.groups}
        if not planned.issuperset(map(id, self.param_groups)):
            self._made[:] = self._planned(self.param_groups)
        fit = [plan.fits() for plan in self._made]
        if not all(fit):
            now = zip(self._made, fit, strict=True)
            parts = [[plan] if fits else self._planned(plan.groups) for plan, fits in now]
            self._made[:] = [plan for part in parts for plan in part]
        return self._made

    def _planned(self, groups: list[dict[str, Any]]) -> list[Plan]:
        """Return the plans of groups, one for all that are alike."""
        alike: dict[Hashable, list[dict[str, Any]]] = {}
        for group in groups:
            self._normalise(group)  # A distributed checkpoint makes lists of tuples.
            alike.setdefault(self._likeness(group), []).append(group)
        return [self._plan(same) for same in alike.values()]

    def _likeness(self, group: dict[str, Any]) -> Hashable:
        """Return what is equal of groups that are stepped as one.

        Learning rates of equal schedules: at the start of a warm-up all are 0. Step counts: those
        that are apart would be stepped apart for long.
        """
        steps = max((self.state.get(p, {}).get("step", 0) for p in group["params"]), default=0)
        names = (*self.rules[group["rule"]].hyperparameters(), "rule", "initial_lr", OBSERVED)
        return int(steps), *(hashable(group.get(name)) for name in names)

    def _plan(self, groups: list[dict[str, Any]]) -> Plan:
        rule = self.rules[groups[0]["rule"]]
        keys = {}
        if rule.draws:
            keys = {p: random.new_key(self.seed, i) for i, p in enumerate(self._parameters())}
        plan = Plan.of(
            groups,
            rule,
            self.state,
            runs=self.runs,
            compiled=self._compiles(),
            keys=keys,
        )
        self._shared(plan)
        return plan

    def _compiles(self) -> bool:
        if self.compile == "auto":
            size = sum(p.numel() for group in self.param_groups for p in group["params"])
            return size >= COMPILE_ELEMENTS and stepping.can_compile()
        return self.compile and stepping.can_compile()

    def _shared(self, plan: Plan) -> dict[str, Tensor]:
        """Return the shared values of a plan's rule.

        They live in the first parameter group of the rule, so that a state_dict has them.
        """
        initial = plan.rule.shared()
        if not initial:
            return {}
        group = next(g for g in self.param_groups if g["rule"] == plan.name)
        shape = () if self.runs is None else (self.runs,)
        if "shared" not in group:
            group["shared"] = {
                name: torch.full(shape, value, dtype=torch.float64)
                for name, value in initial.items()
            }
        held: dict[str, Tensor] = group["shared"]
        return held

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _keeping(self) -> list[Tensor]:
        """Return the parameters whose gradient is state."""
        return [
            p
            for group in self.param_groups
            if self.rules[group["rule"]].keeps_gradient
            for p in group["params"]
        ]

    @property
    def skipped_steps(self) -> int:
        """How many steps were left out because a gradient was not finite."""
        return int(self.param_groups[0].get(SKIPPED, 0))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients. What is state in them is held, and added at the next step."""
        for p in self._keeping():
            p.grad = None
        super().zero_grad(set_to_none)

    def state_bytes(self) -> int:
        """Return the bytes of optimizer state on all devices, step counts left out."""
        return sum(
            tensor.numel() * tensor.element_size()
            for plan in self._plans()
            for bucket in plan.buckets
            for state in bucket.states
            for tensor in state.values()
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the state, in evaluation mode with the weights that `train` brings back."""
        found = super().state_dict()
        for i, p in enumerate(self._parameters()):
            for name, values in ((KEPT, self._kept.values), (HELD, self._held)):
                if p in values:
                    found["state"][i] = {**found["state"].get(i, {}), name: values[p]}
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned, dtypes unchanged.

        Raises UserError where it was saved by other rules, ValueError where groups differ in size.
        """
        saved: dict[Any, dict[str, Any]] = state_dict["state"]
        for mine, theirs in zip(self.param_groups, state_dict["param_groups"], strict=False):
            if mine["rule"] != theirs.get("rule"):
                raise UserError(
                    f"The state to load was saved by the rule {theirs.get('rule')!r}, but this "
                    f"parameter group is stepped by {mine['rule']!r}."
                )
            stepped = [saved[i] for i in theirs["params"] if saved.get(i, {}).get("step")]
            if theirs.get(EVALUATING) and any(HELD not in own for own in stepped):
                raise UserError(
                    "The state to load was saved in evaluation mode, but the training weights are "
                    "not in it; call optimizer.train() before saving (a distributed checkpoint "
                    "loads only what a fresh optimizer has)."
                )
        super().load_state_dict(state_dict)
        for group in self.param_groups:  # saved before the rule had all of its hyperparameters
            for name, value in self.rules[group["rule"]].hyperparameters().items():
                group.setdefault(name, value)
        # torch casts state to the parameter's dtype, which would round float32 moments of bfloat16
        # parameters at every resume: take the values as they were saved.
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        self._held.clear()
        kept = {}
        for i, p in zip(ids, self._parameters(), strict=True):
            if i in saved:
                own = self.state[p] = dict(saved[i])
                if (left := own.pop(KEPT, None)) is not None:
                    kept[p] = _like(p, left)
                if (held := own.pop(HELD, None)) is not None:
                    self._held[p] = _like(p, held)
        self._kept.load(kept)
        # Without state there may be no parameters yet where they will be (on a GPU, sharded).
        if saved:
            self._plans()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **{name: getattr(self, name) for name in OWN_ATTRIBUTES}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.setdefault("_made", []).clear()
        super().__setstate__(state)


@torch.no_grad()
def _like(param: Tensor, value: Tensor) -> Tensor:
    """Return a saved value with the dtype, place and sharding of a parameter."""
    found = torch.empty_like(param)
    copy_to(found, value)
    return found
