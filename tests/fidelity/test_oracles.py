"""Each optimizer against independent implementations from PyPI, over 32 steps."""

from __future__ import annotations

import importlib
import importlib.metadata
import pkgutil
from typing import Any

import cases
import harness
import problems
import pytest
import torch
from harness import TOKENS, Oracle
from measured import displacement_error, record
from torch.optim.lr_scheduler import LambdaLR

import steepest

STEPS = 32
ORACLES: list[Oracle] = [
    oracle
    for module in pkgutil.iter_modules(cases.__path__)
    for oracle in importlib.import_module(f"cases.{module.name}").ORACLES
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("oracle", ORACLES, ids=str)
def test_independent_implementations(oracle: Oracle, dtype: torch.dtype) -> None:
    hyper = {"weight_decay": 0.1, **oracle.hyper}
    ours = problems.parameters(dtype, oracle.shapes)
    theirs = problems.parameters(dtype, oracle.shapes)
    start = list(harness.snapshot(ours).values())
    # Group by group, and one role for all: everything is decayed, as the oracles do.
    groups: list[dict[str, Any]] = [{"params": ours}]
    if oracle.role is not None:
        groups[0] |= {"role": oracle.role, "weight_decay": hyper["weight_decay"]}
    precision = str(dtype).removeprefix("torch.")
    known = steepest.describe(oracle.name).hyperparameters
    more = {"ns_dtype": precision} if "ns_dtype" in known else {}
    optimizer = steepest.create(
        oracle.name, groups, wrap=oracle.wrap, compile=False, **{**more, **hyper}
    )
    other = oracle.make(theirs, **hyper)
    schedulers = [LambdaLR(o, problems.cosine) for o in (optimizer, other) if oracle.schedule]
    extra = problems.stream(STEPS, oracle.shapes, seed=8)
    for grads, others in zip(problems.stream(STEPS, oracle.shapes), extra, strict=True):
        if optimizer.wants():
            assert oracle.observe is not None
            problems.set_gradients(ours, others)
            problems.set_gradients(theirs, others)
            optimizer.observe(batch_tokens=TOKENS)
            oracle.observe(other)
        problems.set_gradients(ours, grads)
        problems.set_gradients(theirs, grads)
        optimizer.step()
        other.step()
        for scheduler in schedulers:
            scheduler.step()
    ends = [list(harness.snapshot(side).values()) for side in (ours, theirs)]
    version = importlib.metadata.version(oracle.package).partition("+")[0]
    roundings = 2 * STEPS if dtype == torch.float32 else 0
    tolerance = oracle.tolerance64 if dtype == torch.float64 else oracle.tolerance32
    error = record(
        " ".join(filter(None, (*oracle.wrap, oracle.name, oracle.label))),
        f"{precision}, {oracle.package} {version}",
        displacement_error(*ends, start, roundings),
        oracle.difference,
    )
    assert error < tolerance
