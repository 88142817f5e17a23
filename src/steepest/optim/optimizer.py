"""The torch optimizer that gives each parameter its rule and steps them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, overload

import torch
from torch import Tensor

from steepest.errors import UserError, unknown
from steepest.optim import hyperparameters, random, stepping
from steepest.optim.live import Layout
from steepest.optim.pieces import full
from steepest.optim.plan import Plan
from steepest.optim.roles import check_split
from steepest.optim.rule import Extra, Rule
from steepest.optim.turns import Turn, Values, combine, to_device

COMPILE_ELEMENTS = 4_000_000
"""With compile="auto", parameters below this many elements run eagerly: a step takes less time
than compiling could win back in a short run."""

RESERVED = frozenset(
    {"params", "param_names", "rule", "role", "initial_lr", "shared", "split", "transposed", "bank"}
)

KEPT = "kept_gradient"
"""Name, in a saved state, of a gradient that is state."""

OWN_ATTRIBUTES = (
    "rules",
    "runs",
    "compile",
    "seed",
    "nonfinite",
    "skipped_steps",
    "_observed",
    "_held",
)
"""What a copy or a pickle keeps beside what torch's own optimizers have."""


class Optimizer(torch.optim.Optimizer):
    """Steps parameters by rules; made by `steepest.create`, usable wherever torch's own are.

    `groups` are torch parameter groups. Each names its rule in `"rule"` (a key of `rules`; may be
    left out when there is only one) and may set any hyperparameter of that rule; what it leaves
    out is the rule's. Values in `param_groups` are live: change them, or let an lr scheduler.

    With `runs=K` every parameter has a leading dimension of K independent runs, and any float
    hyperparameter may be a 1-D float64 tensor of K values. torch's lr schedulers set one number, so
    with an lr per run set `param_groups[i]["lr"]` yourself.

    `compile`: True, False, or "auto" (compile where there are enough parameters and a compiler).
    `seed`: of the random numbers that some rules use. `nonfinite`: what a step does with gradients
    that are not finite. "propagate" lets them reach the parameters, where the loss shows them, and
    never waits for a GPU; "skip" leaves everything as it was and counts in `skipped_steps`; "raise"
    raises FloatingPointError.

    Raises UserError (a ValueError) for an unknown hyperparameter or rule.
    """

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
        self.skipped_steps = 0
        self._observed: set[Extra] = set()
        self._held: dict[Tensor, Tensor] = {}
        self._made: list[Plan] | None = None
        if compile not in (True, False, "auto"):
            raise UserError(f"compile is {compile!r}; it must be True, False or 'auto'.")
        if nonfinite not in ("propagate", "skip", "raise"):
            raise UserError(f"nonfinite is {nonfinite!r}; it must be propagate, skip or raise.")
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
        check_split(param_group.get("split"))
        super().add_param_group(param_group)
        try:
            self._check_shapes(self.param_groups[-1])
        except UserError:
            del self.param_groups[-1]
            raise
        self._made = None

    def _check_shapes(self, group: dict[str, Any]) -> None:
        rule = self.rules[group["rule"]]
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
        """Update every parameter that has a gradient; return the closure's loss if given one.

        A closure is called once more, before, where a rule wants the gradient at the previous
        weights. Raises UserError in evaluation mode, and where an extra gradient is missing.
        """
        self._training("step")
        loss = None
        if closure is not None:
            if "previous_weights" in self.wants():
                with self.previous_weights(), torch.enable_grad():
                    closure()
                self.observe()
            with torch.enable_grad():
                loss = closure()
        if self._nonfinite():
            return loss
        self._check_observed()
        turns = [turn for plan in self._plans() for turn in plan.due(self.state)]
        for name in dict.fromkeys(turn.plan.name for turn in turns if turn.plan.rule.shared()):
            mine = [turn for turn in turns if turn.plan.name == name]
            self._shared(mine[0].plan).update(combine(mine, Values(self._shared)))
        values = Values(self._shared)
        for turn in turns:
            _run(turn, values.of(turn))
        self._observed.clear()
        return loss

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

    def wants(self) -> set[Extra]:
        """Return the extra gradients that `observe` must be given before the next step.

        "sampled_labels": of the loss on labels sampled from the model's own predictions, over all
        of the batch. "previous_weights": of the loss on the coming batch at the weights before the
        last step, which `previous_weights()` puts in place.
        """
        found = {extra for plan in self._plans() for extra in plan.wants(self.state)}
        return found - self._observed

    @torch.no_grad()
    def observe(self, batch_tokens: int = 1) -> None:
        """Take the gradients that are there as the extra ones that `wants` names, and clear them.

        `batch_tokens` is the number of tokens that their loss is the mean of.
        """
        wanted = self.wants()
        for plan in self._plans():
            for turn in plan.due_to_observe(wanted, self.state):
                values = {**turn.values(), "batch_tokens": float(batch_tokens)}
                layout = Layout.of(values)
                vector = to_device(layout.pack(values, self.runs), turn.device)
                turn.run("observe", vector, layout)
                turn.keep_state()
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None
        self._observed |= wanted

    def _check_observed(self) -> None:
        if missing := self.wants():
            raise UserError(
                f"This step needs the extra gradient {sorted(missing)[0]!r}: compute it and call "
                "optimizer.observe() before the batch's own gradient (see Optimizer.wants)."
            )

    @contextmanager
    def previous_weights(self) -> Iterator[None]:
        """Put the weights before the last step in place while the context lasts."""
        held = [
            (p, own["previous_param"], p.detach().clone())
            for p, own in self.state.items()
            if "previous_param" in own and own["step"] > 0
        ]
        with torch.no_grad():
            for p, before, _ in held:
                p.copy_(before)
        try:
            yield
        finally:
            with torch.no_grad():
                for p, _, now in held:
                    p.copy_(now)

    @torch.no_grad()
    def eval(self) -> None:
        """Put the evaluation weights in place, of rules that have others than the training weights.

        `train` brings the training weights back to the bit. For other rules both do nothing.
        """
        if self._held:
            return
        values = Values(self._shared)
        for plan in self._plans():
            for turn in plan.stepped(self.state) if plan.rule.averages else []:
                for piece in turn.part.pieces:
                    self._held[piece.param] = piece.param.detach().clone()
                turn.inputs = turn.part.gather(grads=False)
                turn.run("average", values.of(turn))
                turn.part.scatter(turn.inputs)

    @torch.no_grad()
    def train(self) -> None:
        """Bring back the training weights after `eval`."""
        for p, value in self._held.items():
            p.copy_(value)
        self._held = {}

    def _training(self, what: str) -> None:
        if self._held:
            raise UserError(
                f"The optimizer is in evaluation mode, with averaged weights in place; call "
                f"optimizer.train() before {what}."
            )

    def _nonfinite(self) -> bool:
        """Say whether the step is to be skipped because a gradient is not finite."""
        if self.nonfinite == "propagate":
            return False
        grads = [p.grad for g in self.param_groups for p in g["params"] if p.grad is not None]
        largest = full(torch.nn.utils.get_total_norm(grads, torch.inf))
        if bool(largest.isfinite()):
            return False
        if self.nonfinite == "raise":
            raise FloatingPointError("A gradient is not finite; no parameter was stepped.")
        self.skipped_steps += 1
        return True

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, but for rules whose state is what is left in them."""
        kept = {p: p.grad for p in self._keeping()}
        for p in kept:
            p.grad = None
        super().zero_grad(set_to_none)
        for p, grad in kept.items():
            p.grad = grad

    def _plans(self) -> list[Plan]:
        """Return how each group is stepped, made anew where a static hyperparameter changed."""
        if self._made is None:
            self._made = [self._plan(group) for group in self.param_groups]
        for index, (group, plan) in enumerate(zip(self.param_groups, self._made, strict=True)):
            if not plan.fits(group):
                self._made[index] = self._plan(group)
        return self._made

    def _plan(self, group: dict[str, Any]) -> Plan:
        params = [p for g in self.param_groups for p in g["params"]]
        keys = {p: random.new_key(self.seed, index) for index, p in enumerate(params)}
        return Plan.of(
            group,
            self.rules[group["rule"]],
            self.state,
            runs=self.runs,
            compiled=self._compiles(),
            keys=keys,
        )

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
                if (kept := self.state[p].pop(KEPT, None)) is not None:
                    p.grad = kept.detach().clone()
        self._plans()

    def __getstate__(self) -> dict[str, Any]:
        kept = (
            "rules",
            "runs",
            "compile",
            "seed",
            "nonfinite",
            "skipped_steps",
            "_observed",
            "_held",
        )
        return {**super().__getstate__(), **{name: getattr(self, name) for name in kept}}

    def state_dict(self) -> dict[str, Any]:
        """Return the state. Raises UserError in evaluation mode (see `eval`)."""
        self._training("state_dict")
        kept = [p for p in self._keeping() if p.grad is not None]
        for p in kept:
            self.state[p][KEPT] = p.grad
        try:
            return super().state_dict()
        finally:
            for p in kept:
                del self.state[p][KEPT]

    @property
    def averages(self) -> bool:
        """Whether some rule has other weights for evaluation than for training."""
        return any(rule.averages for rule in self.rules.values())

    def _keeping(self) -> list[Tensor]:
        """Return the parameters whose gradient is state."""
        return [
            p
            for group in self.param_groups
            if self.rules[group["rule"]].keeps_gradient
            for p in group["params"]
        ]

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._made = None
        super().__setstate__(state)


def _run(turn: Turn, values: Tensor) -> None:
    rule = turn.plan.rule
    if turn.starting:
        turn.run("start", values)
    else:
        if rule.prepares(turn.step):
            turn.run("prepare", values)
        turn.run("update", values)
    if rule.refreshes(turn.step):
        turn.run("refresh", values)
    turn.finish()
