"""The held-out losses of a run as it goes: of its weights, and of their averages."""

from __future__ import annotations

import math
from typing import Any

from steepest.data import TokenData
from steepest.data.splits import TokenSplit
from steepest.train import evaluation
from steepest.train.averaging import Averages
from steepest.train.config import RunConfig
from steepest.train.learner import Learner
from steepest.train.timing import StepClock


class HeldOut:
    """Measures the losses of a run's weights, and keeps the first and the last ones."""

    def __init__(
        self,
        config: RunConfig,
        tokens: TokenData,
        learner: Learner,
        averages: Averages,
        clock: StepClock,
    ) -> None:
        self.config, self.tokens = config, tokens
        self.learner, self.averages, self.clock = learner, averages, clock
        self.initial: float | None = None
        self.last: float | None = None
        self.averaged: dict[str, float | None] = {}
        """None where it is not finite, as of averages of weights that were about to be."""

    def measure(self) -> tuple[float, dict[str, Any]]:
        """Return the loss of the weights that the optimizer wants evaluated, and all numbers.

        If that loss is not finite, there are none, and what was kept stays.
        """
        wanted, learner = self.config.evaluation, self.learner
        train: dict[str, float | None] = {}
        with evaluation.evaluation_weights(learner.model, learner.optimizer):
            score = self._score(self.tokens.validation, wanted.tokens)
            if wanted.train_tokens:
                seen = self._score(self.tokens.train, wanted.train_tokens)
                train = {
                    "train_loss": _finite(seen.nats),
                    "train_bits_per_byte": _finite(seen.bits_per_byte),
                }
        if not math.isfinite(score.nats):
            return score.nats, {}
        self.last = score.nats
        if self.initial is None:
            self.initial = score.nats
        self.averaged = {}
        for name in self.averages.names():
            with self.averages.weights(name):
                held_out = self._score(self.tokens.validation, wanted.tokens)
            self.averaged[name] = _finite(held_out.nats)
        numbers = {
            "val_loss": score.nats,
            "val_perplexity": _finite(score.perplexity),
            "val_bits_per_byte": score.bits_per_byte,
            **self._averaged(),
            **train,
        }
        return score.nats, numbers

    def _score(self, split: TokenSplit, tokens: int) -> evaluation.Score:
        """Return the loss over tokens of a split with the weights that are in place."""
        learner = self.learner
        with self.clock.evaluating():
            return evaluation.evaluate(
                learner.model,
                split,
                self.config,
                learner.device,
                tokens=tokens,
                parallel=learner.parallel,
            )

    def _bits(self, nats: float | None) -> float | None:
        if nats is None:
            return None
        return evaluation.Score(nats, self.tokens.validation.bytes_per_token).bits_per_byte

    def _perplexity(self, nats: float | None) -> float | None:
        if nats is None:
            return None
        return _finite(evaluation.Score(nats, 1.0).perplexity)

    def _averaged(self) -> dict[str, dict[str, float | None]]:
        averaged = self.averaged.items()
        return {
            "averaged": self.averaged,
            "averaged_perplexity": {name: self._perplexity(nats) for name, nats in averaged},
            "averaged_bits_per_byte": {name: self._bits(nats) for name, nats in averaged},
        }

    def summary(self, *, finished: bool) -> dict[str, Any]:
        """Return what a result tells; the last losses only of a run that is `finished`."""
        last = self.last if finished else None
        averaged = self._averaged()
        return {
            "initial_val_loss": self.initial,
            "val_loss": last,
            "val_perplexity": self._perplexity(last),
            "val_bits_per_byte": self._bits(last),
            **(averaged if finished else {name: {} for name in averaged}),
        }

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs."""
        return {
            "initial_val_loss": self.initial,
            "val_loss": self.last,
            "averaged": self.averaged,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        self.initial, self.last = state["initial_val_loss"], state["val_loss"]
        self.averaged = state["averaged"]


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None
