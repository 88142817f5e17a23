"""What a race is: a protocol that is the same for all, and each optimizer's learning rates."""

from __future__ import annotations

import hashlib
import importlib.resources
import itertools
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

from steepest import compiler, data, models
from steepest.errors import UserError
from steepest.optim import catalogue
from steepest.train import (
    DataConfig,
    EvaluationConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    TrainingConfig,
)

TUNING_SEED = 0
"""Seed of the runs that choose the learning rate. Final runs use other seeds: the best of several
runs is partly the luckiest, and luck does not carry over to a fresh seed."""


@dataclass(frozen=True)
class Entrant:
    """An optimizer in a race: its name, the learning rates to try, and its other settings."""

    name: str
    lrs: tuple[float, ...]
    options: dict[str, Any]
    note: str


@dataclass(frozen=True)
class RacePlan:
    """A race: every run of it follows from this."""

    entrants: tuple[Entrant, ...]
    base: RunConfig
    """The config that all runs share; its optimizer and seed are those of no run."""
    seeds: int
    baseline: str | None
    """Optimizer to compare with; None leaves it to the race (see `run_race`)."""
    model: str

    def config(self, entrant: Entrant, lr: float, seed: int) -> RunConfig:
        """Return the config of one run."""
        return replace(
            self.base,
            optimizer=OptimizerConfig(entrant.name, lr, entrant.options),
            training=replace(self.base.training, seed=seed),
        )

    def tuning(self, entrant: Entrant) -> list[RunConfig]:
        """Return the runs that choose the entrant's learning rate."""
        return [self.config(entrant, lr, TUNING_SEED) for lr in entrant.lrs]

    def final(self, entrant: Entrant, lr: float) -> list[RunConfig]:
        """Return the runs that the entrant is ranked by."""
        return [self.config(entrant, lr, TUNING_SEED + 1 + i) for i in range(self.seeds)]

    @property
    def runs(self) -> int:
        """The number of runs, if no optimizer diverges at every learning rate."""
        return sum(len(entrant.lrs) + self.seeds for entrant in self.entrants)

    def protocol(self) -> dict[str, str | int | float | bool]:
        """Return what all runs share, flat, for the report; equal protocols can be compared.

        How many learning rates and seeds there are is not part of it: more of them make a race
        better, not another one.
        """
        base = self.base
        size = models.parameter_count(base.model).total
        return {
            "model": self.model,
            "parameters": size,
            "layers": base.model.layers,
            "hidden_size": base.model.hidden_size,
            "corpus": base.data.corpus,
            "vocab_size": base.data.vocab_size,
            "sequence_length": base.data.sequence_length,
            "batch_size": base.data.batch_size,
            "steps": base.training.steps,
            "tokens": base.training.steps * base.tokens_per_step,
            "tokens_per_parameter": round(base.training.steps * base.tokens_per_step / size, 2),
            "schedule": base.schedule.name,
            "warmup_steps": base.schedule.warmup_steps,
            "final_lr_ratio": base.schedule.final_lr_ratio,
            "clip_norm": base.training.clip_norm,
            "precision": base.training.precision,
            "compile": base.training.compile,
            "eval_tokens": base.evaluation.tokens,
            "config": self._shared(),
        }

    def _shared(self) -> str:
        """Return 8 hexadecimal digits over everything that runs share, named above or not."""
        shared = self.base.to_dict()
        del shared["optimizer"], shared["training"]["seed"], shared["data"]["corpus"]
        return hashlib.sha256(json.dumps(shared, sort_keys=True).encode()).hexdigest()[:8]

    def key(self) -> str:
        """Return 8 hexadecimal digits that differ between protocols, for a directory's name."""
        text = json.dumps(self.protocol(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:8]


@cache
def defaults() -> Mapping[str, Any]:
    """Return race.toml."""
    text = importlib.resources.files("steepest.study").joinpath("race.toml").read_text()
    return tomllib.loads(text)


def entrant(name: str, lrs: tuple[float, ...]) -> Entrant:
    """Return an optimizer with the given learning rates, or those of race.toml.

    Raises UserError for a name that is neither in the catalogue nor a `file.py:Class`.
    """
    known = defaults()["optimizers"].get(name)
    if known is None:
        if ":" not in name:
            catalogue.recipe(name)
        known = defaults()["unknown"]
    grid = tuple(sorted(set(lrs or known["lrs"])))
    return Entrant(name, grid, known.get("options", {}), known.get("note", ""))


def grids(given: tuple[str, ...], names: tuple[str, ...]) -> dict[str, tuple[float, ...]]:
    """Return the learning rates given on the command line, by optimizer.

    Each item is a number, for every optimizer, or `name=number,number,...` for one of `names`.
    Raises UserError for anything else.
    """
    common = tuple(_lr(item) for item in given if "=" not in item)
    result = dict.fromkeys(names, common)
    for item in given:
        name, equals, numbers = item.rpartition("=")
        if equals:
            if name not in names:
                raise UserError(
                    f"--lrs names {name!r}, but the race is between {', '.join(names)}."
                )
            result[name] = tuple(_lr(number) for number in numbers.split(","))
    return result


def _lr(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise UserError(
            f"--lrs takes positive numbers, or name=number,number for one optimizer, not {text!r}."
        )
    return value


def base_config(
    *,
    model: str,
    corpus: str,
    vocab_size: int | None,
    tokens: int,
    batch_size: int,
    sequence_length: int,
    schedule: Literal["cosine", "linear", "wsd", "constant"],
    precision: Literal["float32", "bfloat16"],
    compile: bool | None,
) -> RunConfig:
    """Return the config that the runs of a race share.

    `tokens` is rounded up to whole steps. `compile` None compiles where a C++ compiler is found.
    The text is tokenized here, so that its content is part of the config.
    Raises UserError for what cannot be trained.
    """
    protocol = defaults()["protocol"]
    size = models.size(model)
    if vocab_size is not None:
        size = replace(size, vocab_size=vocab_size)
    steps = max(2, -(-tokens // (batch_size * sequence_length)))
    fingerprint = data.prepare(corpus, size.vocab_size).fingerprint
    return RunConfig(
        model=size,
        data=DataConfig(
            corpus=corpus,
            vocab_size=size.vocab_size,
            sequence_length=sequence_length,
            batch_size=batch_size,
            fingerprint=fingerprint,
        ),
        schedule=ScheduleConfig(
            schedule,
            warmup_steps=round(protocol["warmup_fraction"] * steps),
            final_lr_ratio=protocol["final_lr_ratio"],
        ),
        training=TrainingConfig(
            steps=steps,
            clip_norm=protocol["clip_norm"],
            precision=precision,
            compile=not compiler.problem() if compile is None else compile,
        ),
        evaluation=EvaluationConfig(
            every=max(1, -(-steps // protocol["evaluations"])), tokens=protocol["eval_tokens"]
        ),
    )


def duplicates(names: tuple[str, ...]) -> list[str]:
    """Return names that are given more than once."""
    return [name for name, group in itertools.groupby(sorted(names)) if len(list(group)) > 1]
