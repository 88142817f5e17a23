"""How long a run takes on this machine, from a few of its own steps on as many rows as is quick."""

from __future__ import annotations

import dataclasses
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from steepest.data import Batch
from steepest.train import optimizers, precision
from steepest.train.batch_size import BatchConfig
from steepest.train.config import RunConfig
from steepest.train.learner import Learner
from steepest.train.peaks import peak_of
from steepest.train.planning import USABLE, Plan
from steepest.train.timing import StepClock

STEP_SECONDS = 1.0
"""Time that forward and backward pass of a measured step take about, if one row is not longer."""
SECONDS = 3.0
"""Time after which no further step is measured."""
MOST_STEPS = 50
LONGEST_ROW = 8.0
"""Seconds that one row takes at most, if it is to be measured."""
SHARE_OF_MEMORY = 0.5
"""Part of the machine's memory that measuring may take."""
RAPL = Path("/sys/class/powercap")
"""Where Linux tells the energy of processors."""


@dataclass(frozen=True)
class Measurement:
    """What a run takes on this machine."""

    seconds: float
    """Of the whole run, evaluations included."""
    joules: float | None
    """Of the whole run: a GPU's at board power, a CPU's as its counters have it; or not known."""
    step_seconds: float
    optimizer_seconds: float
    """Of a step."""
    tokens_per_second: float
    state_bytes: int
    steps: int
    """Steps measured."""
    rows: int
    """Rows of those."""
    memory_bytes: float
    """Of the machine, or of its GPU."""
    fits: bool
    """Whether a step of the run holds less than `USABLE` of that."""


def refusal(config: RunConfig, plan: Plan, device: torch.device) -> str:
    """Return why the run's steps are not measured here, as a sentence; empty if they can be."""
    need, limit = _bytes(plan, device, 1), _memory(device)
    if need > SHARE_OF_MEMORY * limit:
        return (
            f"Not measured on this machine: a step of one row takes {need / 1e9:,.1f} GB of memory,"
            f" more than half of its {limit / 1e9:,.1f} GB."
        )
    flops = plan.flops_per_token * config.data.sequence_length
    if (seconds := flops / _flops_per_second(device)) > LONGEST_ROW:
        return (
            "Not measured on this machine: one row's forward and backward pass takes about "
            f"{seconds:,.0f} s, at the speed that matrices are multiplied here."
        )
    return ""


def measure(config: RunConfig, plan: Plan, device: torch.device) -> Measurement:
    """Time a few steps of this config on random tokens, and return what the whole run takes.

    The first steps, on one row, are left out of the times, unless one takes longer than all that
    are measured are to take. The others have the rows of a part of a batch, or fewer where that
    would take long or much memory; the model's time is then taken to be in proportion to rows.
    Nothing is compiled but what the optimizer compiles.
    """
    learner = Learner(_config_of_a_part(config), device)
    _timed(learner, 1, 0.0, 1)  # compiles, and fills caches
    energy, start, rows = _processor_joules(), time.perf_counter(), 1
    model, optimizer, steps = _timed(learner, rows, 0.0, 1)
    if model + optimizer < SECONDS:
        rows = max(1, min(plan.part_rows, int(STEP_SECONDS / model), _fitting_rows(plan, device)))
        energy, start = _processor_joules(), time.perf_counter()
        model, optimizer, steps = _timed(learner, rows, SECONDS, min(MOST_STEPS, plan.steps))
    watts = _watts(device, energy, time.perf_counter() - start)
    tokens = rows * config.data.sequence_length
    of_a_token, evaluation = model / tokens, _evaluation_seconds(learner, rows) / tokens
    seconds = (
        plan.tokens * of_a_token + plan.steps * optimizer + plan.evaluation_tokens * evaluation
    )
    step = plan.tokens / plan.steps * of_a_token + optimizer
    return Measurement(
        seconds=seconds,
        joules=None if watts is None else watts * seconds,
        step_seconds=step,
        optimizer_seconds=optimizer,
        tokens_per_second=plan.tokens / plan.steps / step,
        state_bytes=optimizers.state_bytes(learner.optimizer),
        steps=steps,
        rows=rows,
        memory_bytes=_memory(device),
        fits=_bytes(plan, device, plan.part_rows) <= USABLE * _memory(device),
    )


def _config_of_a_part(config: RunConfig) -> RunConfig:
    """Return the config with one part as the batch; it never comes to the end of the run."""
    rows = config.data.batch_size // config.training.gradient_accumulation
    training = dataclasses.replace(
        config.training,
        gradient_accumulation=1,
        compile=False,
        steps=max(config.training.steps, 2 * MOST_STEPS),
    )
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, batch_size=rows),
        training=training,
        batch=BatchConfig(),
    )


def _timed(learner: Learner, rows: int, seconds: float, most: int) -> tuple[float, float, int]:
    """Take at least one and at most `most` steps, until `seconds` have passed.

    Returns the mean seconds of a step in the model and in the optimizer, and the number of steps.
    """
    config, device = learner.config, learner.device
    clock, start, steps = StepClock(device), time.perf_counter(), 0
    tokens = _random_batch(config, rows, device)
    while steps == 0 or (steps < most and time.perf_counter() - start < seconds):
        begin = clock.mark()
        _, of_optimizer = learner.step(tokens, clock)
        clock.add((begin, begin, *of_optimizer, clock.mark()))
        steps += 1
    if steps == 1:
        parts = clock.part_seconds()
    else:
        parts = {name: total / steps for name, total in clock.totals().items()}
    return parts["model"], parts["optimizer"], steps


@torch.no_grad()
def _evaluation_seconds(learner: Learner, rows: int) -> float:
    """Return how long the loss of rows takes without a gradient, the second time."""
    batch, clock = _random_batch(learner.config, rows, learner.device), StepClock(learner.device)
    learner.model.eval()
    for _ in range(2):
        begin = clock.mark()
        with precision.autocast(learner.config.training.precision, learner.device):
            learner.model.loss(batch.tokens, batch.targets, batch.documents)
        end = clock.mark()
        clock.add((begin, begin, end, end, end))
    learner.model.train()
    return clock.part_seconds()["model"]


def _random_batch(config: RunConfig, rows: int, device: torch.device) -> Batch:
    shape = (rows, config.data.sequence_length + 1)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.model.vocab_size, shape, generator=generator).to(device)
    packed = config.data.packing == "documents"
    documents = torch.zeros_like(tokens[:, 1:], dtype=torch.int32) if packed else None
    return Batch(tokens[:, :-1], tokens[:, 1:], documents)


def _bytes(plan: Plan, device: torch.device, rows: int) -> float:
    """Return what a step of so many rows holds; state that is not known counts as two weights."""
    memory = plan.gpu_memory if device.type == "cuda" else plan.memory
    state = 2 * memory.weights if memory.optimizer_state is None else memory.optimizer_state
    kept = memory.weights + memory.gradients + state
    return kept + memory.activations * rows / plan.part_rows


def _fitting_rows(plan: Plan, device: torch.device) -> int:
    kept = _bytes(plan, device, 0)
    spare = SHARE_OF_MEMORY * _memory(device) - kept
    return int(spare / (_bytes(plan, device, 1) - kept))


def _memory(device: torch.device) -> float:
    """Return the bytes of memory of the machine, or of its GPU."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def _flops_per_second(device: torch.device) -> float:
    """Return how many operations a second a product of float32 matrices is done with."""
    size = 512 if device.type == "cpu" else 4096
    matrix = torch.ones(size, size, device=device)
    clock = StepClock(device)
    for _ in range(3):
        begin = clock.mark()
        matrix @ matrix
        end = clock.mark()
        clock.add((begin, begin, end, end, end))
    return float(2 * size**3 / clock.step_seconds)


def _processor_joules() -> float | None:
    """Return what the counters of all processors stand at; None where none can be read."""
    try:
        counters = [
            int((package / "energy_uj").read_text()) for package in RAPL.glob("intel-rapl:[0-9]")
        ]
    except OSError:
        return None
    return sum(counters) / 1e6 if counters else None


def _watts(device: torch.device, before: float | None, seconds: float) -> float | None:
    """Return the power of a GPU's board, or that of the processors since `before`."""
    if device.type == "cuda":
        peak = peak_of(torch.cuda.get_device_name(device))
        return None if peak is None else peak.watts
    after = _processor_joules()
    if before is None or after is None or after <= before:  # counters start again at their end
        return None
    return (after - before) / seconds
