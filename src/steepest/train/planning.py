"""What a run will take, before anything of it is done: counts, memory, time and energy.

Everything here comes from the config alone; `steepest.train.measuring` times the run's own steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from steepest import models
from steepest.data.bpe import check_vocab_size
from steepest.data.corpus import load_corpus
from steepest.data.shards import is_prepared
from steepest.errors import UserError, unknown
from steepest.optim.memory import held
from steepest.train import optimizers, precision
from steepest.train.activations import activation_bytes
from steepest.train.batch_size import steps_taken
from steepest.train.config import DataConfig, RunConfig
from steepest.train.identity import is_class
from steepest.train.peaks import Peak, peaks
from steepest.train.resolving import open_data

EVALUATION = 1 / 3
"""Part of a training token's operations that evaluating a token takes: the forward pass."""
USABLE = 0.9
"""Part of a GPU's memory that is left beside CUDA's context, fragments and the optimizer's step."""


@dataclass(frozen=True)
class Memory:
    """Bytes that one device holds at most, without sharding, by category.

    The sum is a little more than the peak, as not everything is there at the same time.
    """

    weights: int
    gradients: int
    optimizer_state: int | None
    """None for a class of one's own, whose state is known once it is stepped."""
    averages: int
    activations: int
    """Of a part of a batch; see `activation_bytes`."""

    @property
    def total(self) -> int | None:
        """All of it; None if some is not known."""
        if self.optimizer_state is None:
            return None
        kept = self.weights + self.gradients + self.optimizer_state
        return kept + self.averages + self.activations


@dataclass(frozen=True)
class Plan:
    """What a run is in numbers."""

    parameters: models.ParameterCount
    steps: int
    """Optimizer steps; with the norm test, at most."""
    tokens: int
    """Training tokens."""
    epochs: float | None
    """Passes over the training tokens; None for a corpus that is not tokenized yet."""
    rows: int
    """Sequences per step of data.batch_size."""
    part_rows: int
    """Sequences that go through the model at a time."""
    evaluations: int
    evaluation_tokens: int
    """Of all evaluations; held-out sets may have fewer."""
    flops_per_token: float
    """Operations of training on a token, as `models.training_flops_per_token` counts."""
    memory: Memory
    """On the CPU."""
    gpu_memory: Memory
    """On a GPU."""

    @property
    def training_flops(self) -> float:
        """Operations of forward and backward passes."""
        return self.flops_per_token * self.tokens

    @property
    def evaluation_flops(self) -> float:
        """Operations of evaluations."""
        return EVALUATION * self.flops_per_token * self.evaluation_tokens


@dataclass(frozen=True)
class GPUEstimate:
    """What a run takes on one GPU of a kind."""

    name: str
    memory_bytes: float
    fits: bool | None
    """Whether what it holds is below `USABLE` of the GPU's memory; None if that is not known."""
    seconds: float
    joules: float


def plan(config: RunConfig) -> Plan:
    """Return what a run is in numbers, without its data and allocating nothing large.

    Raises UserError for an optimizer that cannot be built and for data that cannot be used.
    """
    optimizers.check(config.optimizer, config.model)
    corpus_tokens = _corpus_tokens(config.data)
    data, training, evaluation = config.data, config.training, config.evaluation
    evaluations = _evaluations(config)
    scored = evaluation.tokens * (1 + len(config.averaging.ema) + len(config.averaging.windows))
    tokens, on_cpu = training.steps * config.tokens_per_step, memory(config)
    return Plan(
        parameters=models.parameter_count(config.model),
        steps=_steps(config),
        tokens=tokens,
        epochs=None if corpus_tokens is None else tokens / corpus_tokens,
        rows=data.batch_size,
        part_rows=data.batch_size // training.gradient_accumulation,
        evaluations=evaluations,
        evaluation_tokens=evaluations * (scored + evaluation.train_tokens),
        flops_per_token=models.training_flops_per_token(config.model, data.sequence_length),
        memory=on_cpu,
        gpu_memory=replace(on_cpu, activations=activation_bytes(config, "cuda")),
    )


def memory(config: RunConfig) -> Memory:
    """Return what a run holds on a CPU; on a GPU only the activations are others."""
    averaging = config.averaging
    copies = len(averaging.ema) + max(averaging.windows, default=0)
    total = models.parameter_count(config.model).total
    bytes_each = precision.weight_dtype(config.training.precision).itemsize
    weights, gradients, state = total * bytes_each, total * bytes_each, None
    if not is_class(config.optimizer.name):
        weights, gradients, state = _held(config)
    return Memory(weights, gradients, state, copies * 4 * total, activation_bytes(config))


def _held(config: RunConfig) -> tuple[int, int, int]:
    """Return the bytes of weights, gradients and state with an optimizer of the catalogue."""
    with torch.device("meta"):
        model = models.build(config.model)
    options: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in config.optimizer.options.items()
    }
    rows = held(
        config.optimizer.name,
        model,
        dtype=precision.weight_dtype(config.training.precision),
        wrap=[*config.optimizer.wrap, *precision.WRAPPERS.get(config.training.precision, ())],
        **options,
    )
    return (
        sum(row.parameter_bytes for row in rows),
        sum(row.gradient_bytes for row in rows),
        sum(row.state_bytes for row in rows),
    )


def _corpus_tokens(config: DataConfig) -> int | None:
    """Return the training tokens of a prepared folder; None for a corpus yet to be tokenized."""
    if is_prepared(Path(config.corpus).expanduser()):
        return len(open_data(config).train)
    check_vocab_size(config.vocab_size)
    load_corpus(config.corpus)
    return None


def _steps(config: RunConfig) -> int:
    """Return the number of steps that a run takes."""
    return steps_taken(config.batch, batch_size=config.data.batch_size, steps=config.training.steps)


def _evaluations(config: RunConfig) -> int:
    """Return how often a run is evaluated: before the first step, after the last, and between."""
    steps, every = _steps(config), config.evaluation.every
    others = {step for step in (*config.evaluation.at, steps) if step <= steps and step % every}
    return 1 + steps // every + len(others)


def with_state(plan: Plan, state_bytes: int) -> Plan:
    """Return the plan with optimizer state that was measured where it was not known."""
    if plan.memory.optimizer_state is not None:
        return plan
    return replace(
        plan,
        memory=replace(plan.memory, optimizer_state=state_bytes),
        gpu_memory=replace(plan.gpu_memory, optimizer_state=state_bytes),
    )


def find_gpus(names: Sequence[str]) -> dict[str, Peak]:
    """Return GPUs of `peaks.toml` by name: those called so, or else all whose names contain it.

    Raises UserError for a name that none contains.
    """
    known = {name: peak for peak in peaks() for name in peak.names}
    found: dict[str, Peak] = {}
    for wanted in names:
        key = wanted.casefold()
        exact = [name for name in known if name.casefold() in (key, f"nvidia {key}")]
        fitting = exact or [name for name in known if key in name.casefold()]
        if not fitting:
            raise unknown("GPU", wanted, known)
        for name in fitting:
            if known[name] not in found.values():
                found[name] = known[name]
    return found


def on_gpu(plan: Plan, name: str, peak: Peak, mfu: float) -> GPUEstimate:
    """Return what a run takes on a GPU that reaches the part `mfu` of its peak in bfloat16.

    Time is all operations over what the GPU then does a second; energy is time at its board power.
    """
    check_mfu(mfu)
    seconds = (plan.training_flops + plan.evaluation_flops) / (peak.bf16_tflops * 1e12 * mfu)
    total = plan.gpu_memory.total
    fits = None if total is None else total <= USABLE * peak.memory_bytes
    return GPUEstimate(name, peak.memory_bytes, fits, seconds, seconds * peak.watts)


def check_mfu(mfu: float) -> None:
    """Raise UserError for a utilisation that is not above 0 and at most 1."""
    if not 0 < mfu <= 1:
        raise UserError(f"--mfu must be above 0 and at most 1, not {mfu}.")
