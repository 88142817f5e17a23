"""The torch optimizer that gives each parameter its rule and steps them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import overload

import torch
from torch import Tensor

from steepest.errors import UserError
from steepest.optim.groups import EVALUATING, SKIPPED, RuledGroups
from steepest.optim.live import Layout
from steepest.optim.pieces import anywhere, copy_to
from steepest.optim.plan import OBSERVED
from steepest.optim.rule import Extra
from steepest.optim.turns import Turn, Values, combine, to_device
from steepest.optim.wrapper import overrides


class Optimizer(RuledGroups):
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
        self._check_training()
        if closure is None and self._only_shows_state():
            return None
        loss = None
        if closure is not None:
            if "previous_weights" in self.wants():
                with self.previous_weights(), torch.enable_grad():
                    closure()
                self.observe()
            with torch.enable_grad():
                loss = closure()
        if self._nonfinite():
            self.param_groups[0][SKIPPED] = self.skipped_steps + 1
            self._mark(OBSERVED, False)
            return loss
        self._check_observed()
        keeping = self._keeping()
        self._kept.add(keeping)
        turns = [turn for plan in self._plans() for turn in plan.due(self.state)]
        measured = [turn for turn in turns if turn.measuring]
        for name in dict.fromkeys(turn.plan.name for turn in measured):
            mine = [turn for turn in measured if turn.plan.name == name]
            self._shared(mine[0].plan).update(combine(mine, Values(self._shared)))
        values = Values(self._shared)
        for turn in turns:
            _run(turn, values.of(turn))
        self._kept.keep(keeping)
        self._mark(OBSERVED, False)
        return loss

    def _only_shows_state(self) -> bool:
        """Make the state, and say so, if this is not a step of training.

        torch.distributed.checkpoint has a fresh optimizer show its state by a step without
        gradients and lr. Taken for a step, it would count, and ask for extra gradients.
        """
        if self.state or any(torch.as_tensor(group["lr"]).any() for group in self.param_groups):
            return False
        if anywhere(self._gradients(), lambda largest: largest != 0):
            return False
        self._plans()
        self._kept.keep(self._keeping())
        return True

    def _gradients(self) -> list[Tensor]:
        return [p.grad for g in self.param_groups for p in g["params"] if p.grad is not None]

    def _nonfinite(self) -> bool:
        """Say whether the step is to be skipped because a gradient is not finite."""
        if self.nonfinite == "propagate":
            return False
        if not anywhere(self._gradients(), lambda largest: ~largest.isfinite()):
            return False
        if self.nonfinite == "raise":
            raise FloatingPointError("A gradient is not finite; no parameter was stepped.")
        return True

    def wants(self) -> set[Extra]:
        """Return the extra gradients that `observe` must be given before the next step.

        "sampled_labels": of the loss on labels sampled from the model's own predictions, over all
        of the batch. "previous_weights": of the loss on the coming batch at the weights before the
        last step, which `previous_weights()` puts in place.
        """
        if not any(overrides(rule, "extra") for rule in self.rules.values()):
            return set()
        extras = {plan.rule.extra() for plan in self._plans() if plan.wants(self.state)}
        return {extra for extra in extras if extra is not None}

    @torch.no_grad()
    def observe(self, batch_tokens: int = 1) -> None:
        """Take the gradients that are there as the extra ones that `wants` names, and clear them.

        `batch_tokens` is the number of tokens that their loss is the mean of. Gradients must have
        been cleared before the extra ones were computed.
        """
        wanting = [plan for plan in self._plans() if plan.wants(self.state)]
        for plan in [] if self._nonfinite() else wanting:
            for turn in plan.due_to_observe(self.state):
                values = {**turn.values(), "batch_tokens": float(batch_tokens)}
                layout = Layout.of(values)
                vector = to_device(layout.pack(values, self.runs), turn.device)
                turn.run("observe", vector, layout)
                turn.keep_state()
        for plan in wanting:
            for group in plan.groups:
                group[OBSERVED] = True
        for p in self._parameters():
            p.grad = None

    def _check_observed(self) -> None:
        if missing := self.wants():
            raise UserError(
                f"This step needs the extra gradient {sorted(missing)[0]!r}: compute it and call "
                "optimizer.observe() before the batch's own gradient (see Optimizer.wants)."
            )

    @contextmanager
    def previous_weights(self) -> Iterator[None]:
        """Put the weights before the last step in place while the context lasts."""
        held: dict[Tensor, Tensor] = {}
        for plan in self._plans():
            for piece, state in plan.pieces():
                p = piece.param
                if "previous_param" in state and self.state[p]["step"] > 0:
                    if p not in held:
                        held[p] = p.detach().clone()
                    with torch.no_grad():
                        piece.write(state["previous_param"])
        try:
            yield
        finally:
            with torch.no_grad():
                for p, now in held.items():
                    p.copy_(now)

    @property
    def averages(self) -> bool:
        """Whether some rule has other weights for evaluation than for training."""
        return any(rule.averages for rule in self.rules.values())

    @torch.no_grad()
    def eval(self) -> None:
        """Put the evaluation weights in place, of rules that have others than the training weights.

        `train` brings the training weights back to the bit. For other rules both do nothing. A
        state saved meanwhile holds the training weights, too.
        """
        if self._held:
            return
        values = Values(self._shared)
        for plan in self._plans():
            for turn in plan.stepped(self.state) if plan.rule.averages else []:
                for piece in turn.part.pieces:
                    if piece.param not in self._held:
                        self._held[piece.param] = piece.param.detach().clone()
                turn.inputs = turn.part.gather(grads=False)
                turn.run("average", values.of(turn))
                turn.part.scatter(turn.inputs)
        self._mark(EVALUATING, bool(self._held))

    @torch.no_grad()
    def train(self) -> None:
        """Bring back the training weights after `eval`."""
        for p, value in self._held.items():
            copy_to(p, value)
        self._held.clear()
        self._mark(EVALUATING, False)

    def _mark(self, key: str, value: bool) -> None:
        """Set a mark of the groups that have it."""
        for group in self.param_groups:
            if key in group:
                group[key] = value

    def _check_training(self) -> None:
        if self._held:
            raise UserError(
                "The optimizer is in evaluation mode, with averaged weights in place; call "
                "optimizer.train() before step."
            )


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
