"""The torch optimizer that gives each parameter its rule and steps them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor

from steepest.errors import UserError, unknown
from steepest.optim import buckets, hyperparameters, stepping
from steepest.optim.hyperparameters import is_zero
from steepest.optim.rule import Layout, Rule, State, Wrapper, is_live

COMPILE_ELEMENTS = 4_000_000
"""With compile="auto", parameters below this many elements run eagerly: a step takes less time
than compiling could win back in a short run."""

RESERVED = frozenset({"params", "param_names", "rule", "role", "initial_lr"})


class Optimizer(torch.optim.Optimizer):
    """Steps parameters by rules; made by `steepest.create`, usable wherever torch's own are.

    `groups` are torch parameter groups. Each names its rule in `"rule"` (a key of `rules`; may be
    left out when there is only one) and may set any hyperparameter of that rule; what it leaves
    out is the rule's. Values in `param_groups` are live: change them, or let an lr scheduler.

    With `runs=K` every parameter has a leading dimension of K independent runs, and any float
    hyperparameter may be a 1-D float64 tensor of K values. torch's lr schedulers set one number, so
    with an lr per run set `param_groups[i]["lr"]` yourself.

    `compile`: True, False, or "auto" (compile where there are enough parameters and a compiler).

    Raises UserError (a ValueError) for an unknown hyperparameter or rule.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        rules: Mapping[str, Rule],
        *,
        runs: int | None = None,
        compile: bool | Literal["auto"] = "auto",
    ) -> None:
        self.rules = dict(rules)
        self.runs = runs
        self.compile = compile
        self._made: list[Plan] | None = None
        if compile not in (True, False, "auto"):
            raise UserError(f"compile is {compile!r}; it must be True, False or 'auto'.")
        super().__init__(groups, {})
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
                raise unknown(f"hyperparameter of {name}", key, defaults)
        for key, value in defaults.items():
            given = param_group.get(key, value)
            param_group[key] = hyperparameters.normal(name, key, given, value, self.runs)
        super().add_param_group(param_group)
        try:
            self._check_shapes(self.param_groups[-1])
        except UserError:
            del self.param_groups[-1]
            raise
        self._made = None

    def _check_shapes(self, group: dict[str, Any]) -> None:
        rule = self.rules[group["rule"]]
        while isinstance(rule, Wrapper):
            rule = rule.inner
        for p in group["params"]:
            shape = tuple(p.shape)
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

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient; return the closure's loss if given one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group, plan in zip(self.param_groups, self._plans(), strict=True):
            self._step_group(group, plan)
        return loss

    def _step_group(self, group: dict[str, Any], plan: Plan) -> None:
        values = stepping.values_of(plan.rule, group)
        packed: dict[int, Tensor] = {}
        for bucket in plan.buckets:
            for step, indices in self._due(bucket).items():
                if step not in packed:
                    now = stepping.with_scalars(plan.rule, values, step, self.runs)
                    packed[step] = plan.layout.pack(now, self.runs)
                vector = _sent(packed[step], bucket.params[0].device)
                if len(indices) == len(bucket.params):
                    self._run(plan, bucket, step, vector, compile=plan.compiled)
                else:
                    with buckets.subset(bucket, indices) as part:
                        self._run(plan, part, step, vector, compile=False)

    def _due(self, bucket: buckets.Bucket) -> dict[int, list[int]]:
        """Return the parameters that have a gradient, by the number of the step they now take."""
        due: dict[int, list[int]] = {}
        for index, p in enumerate(bucket.params):
            if p.grad is not None:
                if p.grad.layout is not torch.strided:
                    raise UserError(
                        f"A parameter of shape {tuple(p.shape)} has a sparse gradient; steepest "
                        "steps dense ones (nn.Embedding(sparse=False))."
                    )
                state = self.state[p]
                state["step"] += 1
                due.setdefault(state["step"], []).append(index)
        return due

    def _run(
        self, plan: Plan, bucket: buckets.Bucket, step: int, values: Tensor, *, compile: bool
    ) -> None:
        rule = plan.rule
        starting = step == 1 and rule.starts()
        kernel = stepping.kernel(
            plan.shared_rule,
            plan.layout,
            self.runs,
            bucket,
            phase="start" if starting else "update",
            compile=compile and not starting,
        )
        inputs = bucket.gather(rule)
        kernel(inputs, values)
        if rule.refreshes(step):
            refresh = stepping.kernel(
                plan.shared_rule, plan.layout, self.runs, bucket, phase="refresh"
            )
            refresh(inputs, values)
        bucket.scatter(inputs)

    def _plans(self) -> list[Plan]:
        """Return how each group is stepped, made anew where a static hyperparameter changed."""
        if self._made is None:
            self._made = [self._plan(group) for group in self.param_groups]
        for index, (group, plan) in enumerate(zip(self.param_groups, self._made, strict=True)):
            if not plan.fits(group, self.runs):
                self._made[index] = self._plan(group)
        return self._made

    def _plan(self, group: dict[str, Any]) -> Plan:
        base = self.rules[group["rule"]]
        rule = base.replace(**{name: group[name] for name in base.hyperparameters()})
        values = stepping.values_of(rule, group)
        layout = Layout.of(stepping.with_scalars(rule, values, 1, self.runs))
        made = buckets.new_buckets(rule, group["params"], self.runs)
        for bucket in made:
            for index, p in enumerate(bucket.params):
                self._adopt(group["rule"], p, bucket.views(index))
        live = {k: v for k, v in base.hyperparameters().items() if k in values and is_live(v)}
        return Plan(rule, rule.replace(**live), layout, made, self._compiles())

    def _adopt(self, rule: str, param: Tensor, views: State) -> None:
        """Make the bucket's state the parameter's, with the values of what was there before."""
        known: dict[str, Any] = self.state.get(param, {})
        held = {name: value for name, value in known.items() if name != "step"}
        if known and {k: v.shape for k, v in held.items()} != {
            k: v.shape for k, v in views.items()
        }:
            raise UserError(
                f"The state of a parameter of shape {tuple(param.shape)} holds "
                f"{_describe(held)}, but {rule} keeps {_describe(views)}: it was saved with "
                "another optimizer, other hyperparameters, or another model."
            )
        for name, value in held.items():
            views[name].copy_(value)
        self.state[param] = {"step": known.get("step", 0), **views}

    def _compiles(self) -> bool:
        if self.compile == "auto":
            size = sum(p.numel() for group in self.param_groups for p in group["params"])
            return size >= COMPILE_ELEMENTS and stepping.can_compile()
        return self.compile and stepping.can_compile()

    def state_bytes(self) -> int:
        """Return the bytes of optimizer state on all devices, step counts left out."""
        return sum(
            tensor.numel() * tensor.element_size()
            for plan in self._plans()
            for bucket in plan.buckets
            for state in bucket.states
            for tensor in state.values()
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned, dtypes unchanged.

        Raises UserError where it was saved by other rules, ValueError where groups differ in size.
        """
        for mine, theirs in zip(self.param_groups, state_dict["param_groups"], strict=False):
            if mine["rule"] != theirs.get("rule"):
                raise UserError(
                    f"The state to load was saved by the rule {theirs.get('rule')!r}, but this "
                    f"parameter group is stepped by {mine['rule']!r}."
                )
        super().load_state_dict(state_dict)
        # torch casts state to the parameter's dtype, which would round float32 moments of bfloat16
        # parameters at every resume: take the values as they were saved.
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(ids, params, strict=True):
            if i in state_dict["state"]:
                self.state[p] = dict(state_dict["state"][i])
        self._plans()

    def __getstate__(self) -> dict[str, Any]:
        own = {"rules": self.rules, "runs": self.runs, "compile": self.compile}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._made = None
        super().__setstate__(state)


@dataclass
class Plan:
    """How one parameter group is stepped."""

    rule: Rule
    shared_rule: Rule
    """The rule with the live values it was made with, so that groups which differ in those alone
    share kernels; the values of the group reach it through `h`."""
    layout: Layout
    buckets: list[buckets.Bucket]
    compiled: bool

    def fits(self, group: dict[str, Any], runs: int | None) -> bool:
        """Say whether the group is stepped as planned, after bringing its values to normal form.

        Raises UserError for a wrong value, and where a change would need state that is not there.
        """
        planned = self.rule.hyperparameters()
        flipped = {}
        for name, value in planned.items():
            now = group[name]
            if type(now) is not float or type(value) is not float or not math.isfinite(now):
                group[name] = now = hyperparameters.normal(group["rule"], name, now, value, runs)
            if is_zero(now) != is_zero(value):
                flipped[name] = now
        if flipped and self._state_names(self.rule) != self._state_names(
            self.rule.replace(**flipped)
        ):
            name, now = next(iter(flipped.items()))
            raise UserError(
                f"{name} of a parameter group went from {planned[name]} to {now}, but it decides "
                "what state is kept; make a new optimizer."
            )
        return all(
            is_live(group[name]) if is_live(value) else group[name] == value
            for name, value in planned.items()
        )

    def _state_names(self, rule: Rule) -> set[str]:
        shape = self.buckets[0].params[0].shape if self.buckets else (1, 1)
        return set(rule.init(torch.empty(shape, device="meta")))


def _sent(values: Tensor, device: torch.device) -> Tensor:
    # Apple GPUs have no float64: there 1 - beta keeps fewer digits.
    dtype = torch.float32 if device.type == "mps" else values.dtype
    return values.to(device, dtype, non_blocking=True)


def _describe(state: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{k} {tuple(v.shape)}" for k, v in state.items()) or "nothing"
