"""How long a race will take, from a few steps made here and now."""

from __future__ import annotations

import time

import torch

from steepest import models
from steepest.study.plan import RacePlan
from steepest.train import precision

STEPS = 3
COMPILED = 0.65
"""Time of a compiled step over an eager one, measured at the default race's model size."""
START_SECONDS = 5.0
COMPILE_SECONDS = 15.0
OPTIMIZER = 1.5
"""Time of a step with optimizer and evaluations over its forward and backward pass."""


def race_seconds(plan: RacePlan, jobs: int) -> float:
    """Return a rough estimate of the wall time of a race, in seconds."""
    config = plan.base
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        step = _step_seconds(plan)
    finally:
        torch.set_num_threads(threads)
    if config.training.compile:
        step *= COMPILED
    rounds = -(-plan.runs // jobs)
    start = START_SECONDS + (COMPILE_SECONDS if config.training.compile else 0.0)
    return start + rounds * config.training.steps * step * OPTIMIZER


def _step_seconds(plan: RacePlan) -> float:
    """Return the time of an eager forward and backward pass on one thread."""
    config = plan.base
    model = models.build(config.model)
    shape = (config.data.batch_size, config.data.sequence_length)
    tokens = torch.zeros(shape, dtype=torch.int64)
    times = []
    for _ in range(STEPS):
        began = time.perf_counter()
        with precision.autocast(config.training.precision, torch.device("cpu")):
            loss = model.loss(tokens, tokens)
        loss.backward()  # type: ignore[no-untyped-call]
        times.append(time.perf_counter() - began)
    return min(times)
