"""How one parameter group is stepped: its rule, its buckets, and whose turn it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from steepest.errors import UserError
from steepest.optim import buckets, hyperparameters, stepping
from steepest.optim.buckets import Bucket, Keys
from steepest.optim.hyperparameters import is_zero
from steepest.optim.live import Layout, is_live
from steepest.optim.pieces import Piece, copy_to, pieces_of, shown
from steepest.optim.rule import Extra, Rule, State, overrides
from steepest.optim.turns import Turn

States = Mapping[Tensor, dict[str, Any]]
"""`optimizer.state`: of each parameter its step count, its memory and its tensors."""


@dataclass
class Plan:
    """How one parameter group is stepped."""

    group: dict[str, Any]
    rule: Rule
    shared_rule: Rule
    """The rule with the live values it was made with, so that groups which differ in those alone
    share kernels; the values of the group reach it through `h`."""
    layout: Layout
    buckets: list[Bucket]
    compiled: bool
    runs: int | None
    harmless: set[frozenset[str]] = field(default_factory=set)
    """Hyperparameters that became zero, or no longer are, and were found to leave the state be."""

    @classmethod
    def of(
        cls,
        group: dict[str, Any],
        base: Rule,
        state: dict[Tensor, dict[str, Any]],
        *,
        runs: int | None,
        compiled: bool,
        keys: Keys,
    ) -> Plan:
        """Return the plan of a group, with new state or that of `state`, which then shows it."""
        rule = base.replace(**{name: group[name] for name in base.hyperparameters()})
        values = stepping.values_of(rule, group)
        memory = _initial_memory(rule, runs)
        first = stepping.remembered(rule, values, 1, memory, runs)
        layout = Layout.of(stepping.with_scalars(rule, values, 1, first, runs))
        layout = layout.with_single(rule.shared())
        live = {k: v for k, v in base.hyperparameters().items() if k in values and is_live(v)}
        pieces = pieces_of(rule, group["params"], group)
        plan = cls(
            group,
            rule,
            rule.replace(**live),
            layout,
            buckets.new_buckets(rule, pieces, runs, keys),
            compiled,
            runs,
        )
        fresh: dict[Tensor, State] = {}
        for piece, own in plan.pieces():
            fresh.setdefault(piece.param, {}).update(shown(piece, own))
        for p, views in fresh.items():
            _adopt(group["rule"], p, views, memory, state)
        return plan

    @property
    def name(self) -> str:
        """Name of the rule."""
        return str(self.group["rule"])

    def values(self) -> dict[str, Any]:
        """Return the live hyperparameters, as the group has them now."""
        return stepping.values_of(self.rule, self.group)

    def pieces(self) -> Iterator[tuple[Piece, State]]:
        """Yield every piece with its state."""
        for bucket in self.buckets:
            for index, piece in enumerate(bucket.pieces):
                yield piece, bucket.views(index)

    def due(self, state: States) -> list[Turn]:
        """Return the parameters that have a gradient, by the number of the step they now take.

        Counts the step, and brings the memory of each up to it.
        """
        values = self.values()
        for p in self.group["params"]:
            if p.grad is not None:
                self._count(values, p, state[p])
        return self._turns(state, lambda own, p: p.grad is not None, ahead=0)

    def wants(self, state: States) -> set[Extra]:
        """Return the extra gradients that some parameter wants before its next step."""
        if not overrides(self.rule, "wants"):
            return set()
        counts = {state[p]["step"] for p in self.group["params"]}
        return {extra for step in counts if (extra := self.rule.wants(step + 1)) is not None}

    def due_to_observe(self, wanted: set[Extra], state: States) -> list[Turn]:
        """Return the parameters whose gradient is the extra one that their next step wants."""

        def due(own: dict[str, Any], p: Tensor) -> bool:
            return p.grad is not None and self.rule.wants(own["step"] + 1) in wanted

        return self._turns(state, due, ahead=1)

    def stepped(self, state: States) -> list[Turn]:
        """Return the parameters that have been stepped, at their last step."""
        return self._turns(state, lambda own, p: own["step"] > 0, ahead=0)

    def _turns(
        self, state: States, chosen: Callable[[dict[str, Any], Tensor], bool], ahead: int
    ) -> list[Turn]:
        turns = []
        for bucket in self.buckets:
            at: dict[Any, list[int]] = {}
            for index, piece in enumerate(bucket.pieces):
                own = state[piece.param]
                if chosen(own, piece.param):
                    held = tuple((name, own[name]) for name in self.rule.memory())
                    at.setdefault((own["step"] + ahead, held), []).append(index)
            for (step, held), indices in at.items():
                memory = dict(held)
                if ahead:
                    memory = stepping.remembered(self.rule, self.values(), step, memory, self.runs)
                turns.append(Turn.of(self, bucket, indices, step, memory))
        return turns

    def _count(self, values: Mapping[str, Any], p: Tensor, own: dict[str, Any]) -> None:
        assert p.grad is not None
        if p.grad.layout is not torch.strided:
            raise UserError(
                f"A parameter of shape {tuple(p.shape)} has a sparse gradient; steepest steps "
                "dense ones (nn.Embedding(sparse=False))."
            )
        own["step"] += 1
        held = {name: own[name] for name in self.rule.memory()}
        own.update(stepping.remembered(self.rule, values, own["step"], held, self.runs))

    def fits(self, group: dict[str, Any]) -> bool:
        """Say whether this group is stepped as planned, after bringing its values to normal form.

        Raises UserError for a wrong value, and where a change would need state that is not there.
        """
        planned = self.rule.hyperparameters()
        flipped = {}
        for name, value in planned.items():
            now = group[name]
            if type(now) is not float or type(value) is not float or not math.isfinite(now):
                label, choices = group["rule"], self.rule.choices(name)
                now = hyperparameters.normal(label, name, now, value, self.runs, choices=choices)
                group[name] = now
            if is_zero(now) != is_zero(value):
                flipped[name] = now
        if flipped and frozenset(flipped) not in self.harmless:
            if self._state_names(self.rule) != self._state_names(self.rule.replace(**flipped)):
                name, now = next(iter(flipped.items()))
                raise UserError(
                    f"{name} of a parameter group went from {planned[name]} to {now}, but it "
                    "decides what state is kept; make a new optimizer."
                )
            self.harmless.add(frozenset(flipped))
        return group is self.group and all(
            is_live(group[name])
            if is_live(value) and name not in self.rule.fixed
            else group[name] == value
            for name, value in planned.items()
        )

    def _state_names(self, rule: Rule) -> set[str]:
        shape = self.buckets[0].pieces[0].shape if self.buckets else (1, 1)
        return set(rule.init(torch.empty(shape, device="meta")))


def _initial_memory(rule: Rule, runs: int | None) -> dict[str, Any]:
    return {name: v if runs is None else (v,) * runs for name, v in rule.memory().items()}


def _adopt(
    rule: str,
    param: Tensor,
    views: State,
    memory: dict[str, Any],
    state: dict[Tensor, dict[str, Any]],
) -> None:
    """Make the bucket's state the parameter's, with the values of what was there before."""
    known: dict[str, Any] = state.get(param, {})
    held = {
        name: value
        for name, value in known.items()
        if isinstance(value, Tensor) and name != "step" and name not in memory
    }
    if known and {k: v.shape for k, v in held.items()} != {k: v.shape for k, v in views.items()}:
        raise UserError(
            f"The state of a parameter of shape {tuple(param.shape)} holds {_describe(held)}, but "
            f"{rule} keeps {_describe(views)}: it was saved with another optimizer, other "
            "hyperparameters, or another model."
        )
    for name, value in held.items():
        copy_to(views[name], value)
    # A distributed checkpoint brings numbers back as tensors, and tuples as lists.
    counts = {"step": int(known.get("step", 0))}
    sums = {name: _numbers(known.get(name, value)) for name, value in memory.items()}
    state[param] = {**counts, **sums, **views}


def _numbers(value: Any) -> Any:
    return tuple(map(float, value)) if isinstance(value, (tuple, list)) else float(value)


def _describe(state: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{k} {tuple(v.shape)}" for k, v in state.items()) or "nothing"
