"""How parameter groups are stepped: their rule, their buckets, and whose turn it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from steepest.errors import UserError
from steepest.optim import buckets, hyperparameters, stepping
from steepest.optim.buckets import Bucket, Keys
from steepest.optim.hyperparameters import hashable, is_zero
from steepest.optim.live import Layout, is_live
from steepest.optim.pieces import Piece, copy_to, pieces_of, shown
from steepest.optim.rule import Rule, State
from steepest.optim.turns import Turn

States = Mapping[Tensor, dict[str, Any]]
"""`optimizer.state`: of each parameter its step count, its memory and its tensors."""

Moment = tuple[int, tuple[tuple[str, Any], ...]]
"""The number of a parameter's step, and its memory."""

OBSERVED = "observed"
"""Key of parameter groups whose rule takes extra gradients: whether it has the coming step's."""


@dataclass
class Plan:
    """How parameter groups of equal values are stepped: together, as if they were one."""

    groups: list[dict[str, Any]]
    rule: Rule
    shared_rule: Rule
    """The rule with the live values it was made with, so that plans which differ in those alone
    share kernels; the values of the groups reach it through `h`."""
    layout: Layout
    buckets: list[Bucket]
    compiled: bool
    runs: int | None
    planned: dict[str, Any]
    """The values of the groups when this was planned."""
    live: tuple[str, ...]
    """Those that reach the rule through `h`."""
    known: list[dict[str, Any]]
    """The values of each group that were last seen to fit."""
    harmless: set[frozenset[str]] = field(default_factory=set)
    """Hyperparameters that became zero, or no longer are, and were found to leave the state be."""

    @classmethod
    def of(
        cls,
        groups: list[dict[str, Any]],
        base: Rule,
        state: dict[Tensor, dict[str, Any]],
        *,
        runs: int | None,
        compiled: bool,
        keys: Keys,
    ) -> Plan:
        """Return the plan of groups, with new state or that of `state`, which then shows it."""
        names = base.hyperparameters()
        values = {name: groups[0][name] for name in names}
        rule = base.replace(**values)
        memory = _initial_memory(rule, runs)
        live = {name: value for name, value in values.items() if is_live(value)}
        first = stepping.remembered(rule, live, 1, memory, runs)
        layout = Layout.of(stepping.with_scalars(rule, live, 1, first, runs))
        usual = {name: names[name] for name in live if is_live(names[name])}
        pieces = [piece for group in groups for piece in pieces_of(rule, group["params"], group)]
        plan = cls(
            groups,
            rule,
            rule.replace(**usual),
            layout.with_single(rule.shared()),
            buckets.new_buckets(rule, pieces, runs, keys),
            compiled,
            runs,
            values,
            tuple(live),
            [{name: group[name] for name in names} for group in groups],
        )
        fresh: dict[Tensor, State] = {}
        for piece, own in plan.pieces():
            fresh.setdefault(piece.param, {}).update(shown(piece, own))
        for p, views in fresh.items():
            _adopt(plan.name, p, views, memory, state)
        return plan

    @property
    def name(self) -> str:
        """Name of the rule."""
        return str(self.groups[0]["rule"])

    def parameters(self) -> Iterator[Tensor]:
        """Yield every parameter."""
        for group in self.groups:
            yield from group["params"]

    def values(self) -> dict[str, Any]:
        """Return the live hyperparameters, as the groups have them now."""
        group = self.groups[0]
        return {name: group[name] for name in self.live}

    def values_at(self, step: int, memory: Mapping[str, Any]) -> dict[str, Any]:
        """Return the live hyperparameters, the memory and the rule's scalars at a step."""
        return stepping.with_scalars(self.rule, self.values(), step, memory, self.runs)

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
        for p in self.parameters():
            if p.grad is not None:
                self._count(values, p, state[p])
        return self._turns(state, lambda own, p: p.grad is not None, ahead=0)

    def wants(self, state: States) -> bool:
        """Say whether some parameter is to be given the extra gradient before its next step."""
        if self.rule.extra() is None or self.groups[0].get(OBSERVED):
            return False
        counts = {state[p]["step"] for p in self.parameters()}
        return any(self.rule.wants(step + 1) for step in counts)

    def due_to_observe(self, state: States) -> list[Turn]:
        """Return the parameters whose gradient is the extra one that their next step wants."""

        def due(own: dict[str, Any], p: Tensor) -> bool:
            return p.grad is not None and self.rule.wants(own["step"] + 1)

        return self._turns(state, due, ahead=1)

    def stepped(self, state: States) -> list[Turn]:
        """Return the parameters that have been stepped, at their last step."""
        return self._turns(state, lambda own, p: own["step"] > 0, ahead=0)

    def _turns(
        self, state: States, chosen: Callable[[dict[str, Any], Tensor], bool], ahead: int
    ) -> list[Turn]:
        remembers = tuple(self.rule.memory())
        turns = []
        for bucket in self.buckets:
            at: dict[Moment, list[int]] = {}
            for index, piece in enumerate(bucket.pieces):
                own = state[piece.param]
                if chosen(own, piece.param):
                    held = tuple((name, own[name]) for name in remembers)
                    at.setdefault((own["step"] + ahead, held), []).append(index)
            for (step, held), indices in (at if ahead else self._alike(at)).items():
                memory = dict(held)
                if ahead:
                    memory = stepping.remembered(self.rule, self.values(), step, memory, self.runs)
                whole = len(indices) == len(bucket.pieces)
                parts = [bucket] if whole else bucket.parts(indices)
                turns += [Turn(self, part, step, memory) for part in parts]
        return turns

    def _alike(self, at: dict[Moment, list[int]]) -> dict[Moment, list[int]]:
        """Return the moments of a bucket's pieces, those at which the rule does the same as one.

        A parameter that once had no gradient is a step behind the others for good. Where the step's
        number does not matter, or no longer does, all are stepped together again.
        """
        if len(at) < 2:
            return at
        firsts: dict[Hashable, Moment] = {}
        found: dict[Moment, list[int]] = {}
        for (step, held), indices in at.items():
            does = hashable(tuple(self.values_at(step, dict(held)).items()))
            first = firsts.setdefault((does, _work(self.rule, step)), (step, held))
            found.setdefault(first, []).extend(indices)
        return {moment: sorted(indices) for moment, indices in found.items()}

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

    def fits(self) -> bool:
        """Say whether the groups are stepped as planned, after bringing values to normal form.

        Raises UserError for a wrong value, and where a change would need state that is not there.
        """
        changed = {
            name
            for group, known in zip(self.groups, self.known, strict=True)
            for name in known
            if group[name] is not known[name]
        }
        if not changed:
            return True
        for name in changed:
            self._take(name)
        first, *others = self.groups
        apart = [
            group
            for group in others
            if any(hashable(group[name]) != hashable(first[name]) for name in changed)
        ]
        for group in (first, *apart):
            self._check_state(group)
        return not apart and all(map(self._is_as_planned, changed))

    def _take(self, name: str) -> None:
        """Bring a hyperparameter of all groups to normal form."""
        default, choices = self.planned[name], self.rule.choices(name)
        for group, known in zip(self.groups, self.known, strict=True):
            now = group[name]
            if type(now) is not float or type(default) is not float or not math.isfinite(now):
                now = hyperparameters.normal(
                    self.name, name, now, default, self.runs, choices=choices
                )
            group[name] = known[name] = now

    def _is_as_planned(self, name: str) -> bool:
        now, planned = self.groups[0][name], self.planned[name]
        if is_live(planned) and name not in self.rule.fixed:
            return is_live(now)
        return hashable(now) == hashable(planned)

    def _check_state(self, group: Mapping[str, Any]) -> None:
        """Raise UserError where what decides the state became zero, or no longer is."""
        flipped = {
            name: group[name]
            for name, value in self.planned.items()
            if is_zero(group[name]) != is_zero(value)
        }
        if not flipped or frozenset(flipped) in self.harmless:
            return
        if self._state_names(self.rule) != self._state_names(self.rule.replace(**flipped)):
            name, now = next(iter(flipped.items()))
            raise UserError(
                f"{name} of a parameter group went from {self.planned[name]} to {now}, but it "
                "decides what state is kept; make a new optimizer."
            )
        self.harmless.add(frozenset(flipped))

    def _state_names(self, rule: Rule) -> set[str]:
        shape = self.buckets[0].pieces[0].outline().shape if self.buckets else (1, 1)
        return set(rule.init(torch.empty(shape, device="meta")))


def _work(rule: Rule, step: int) -> tuple[bool, ...]:
    """Return which of its work a rule does at a step."""
    started = step == 1 and rule.starts()
    return started, rule.measures(step), rule.prepares(step), rule.refreshes(step)


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
