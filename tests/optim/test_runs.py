"""K runs of a sweep in one optimizer."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import problems
import pytest
import torch
from engine import (
    NAMES,
    OPTIONS,
    assert_same_bits,
    moved_alike,
    shapes_of,
    train,
)
from torch import nn

import steepest
from steepest.errors import UserError
from steepest.optim import buckets, stepping

PER_RUN: dict[str, dict[str, Any]] = {
    "sgd": {},
    "signum": {"momentum": [0.8, 0.9, 0.95]},
    "lion": {"betas": (0.9, [0.95, 0.98, 0.99])},
    "adamw": {"betas": ([0.8, 0.9, 0.95], [0.9, 0.95, 0.99]), "eps": [1e-8, 1e-6, 1e-4]},
    "adafactor": {"clip_threshold": [0.5, 1.0, 2.0], "decay_rate": [0.7, 0.8, 0.9]},
    "muon": {"momentum": [0.8, 0.9, 0.95], "adam_betas": ([0.8, 0.9, 0.95], 0.95)},
    "soap": {"betas": ([0.8, 0.9, 0.95], [0.9, 0.95, 0.99])},
}


def of_run(value: Any, run: int | None) -> Any:
    """Return a value of PER_RUN for one run, or as tensors for all."""
    if isinstance(value, tuple):
        return tuple(of_run(v, run) for v in value)
    if isinstance(value, list):
        return torch.tensor(value, dtype=torch.float64) if run is None else value[run]
    return value


def options_of(name: str, run: int | None) -> dict[str, Any]:
    per_run = {**PER_RUN[name], "lr": [1e-3, 1e-2, 3e-2], "weight_decay": [0.0, 0.1, 0.3]}
    return {key: of_run(value, run) for key, value in per_run.items()}


def run_groups(params: list[nn.Parameter], shapes: Sequence[tuple[int, ...]]) -> list[Any]:
    """Return groups by the role of the shape of one run."""
    hidden = [p for p, s in zip(params, shapes, strict=True) if len(s) >= 2]
    vectors = [p for p, s in zip(params, shapes, strict=True) if len(s) < 2]
    return [{"params": hidden, "role": "hidden"}, {"params": vectors, "role": "vector"}]


@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_runs_together_are_runs_apart(
    name: str, small: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not small:
        monkeypatch.setattr(buckets, "SMALL", 11)
        monkeypatch.setattr(stepping, "BLOCK", 13)
    shapes = shapes_of(name)
    singles = [problems.parameters(torch.float64, shapes, seed=run) for run in range(3)]
    start = [problems.parameters(torch.float64, shapes, seed=run) for run in range(3)]
    together = [nn.Parameter(torch.stack([p.detach() for p in ps])) for ps in zip(*singles)]  # noqa: B905
    fixed = {"compile": False, **OPTIONS.get(name, {})}
    if name == "muon":
        fixed["ns_dtype"] = "float64"
    optimizer = steepest.create(
        name,
        run_groups(together, shapes),
        runs=3,
        **{**fixed, **options_of(name, None)},
    )
    apart = [
        steepest.create(name, run_groups(ps, shapes), **{**fixed, **options_of(name, run)})
        for run, ps in enumerate(singles)
    ]
    streams = [problems.stream(8, shapes, seed=run) for run in range(3)]
    for grads in zip(*streams, strict=True):
        for p, gs in zip(together, zip(*grads, strict=True), strict=True):
            p.grad = torch.stack(gs).double()
        optimizer.step()
        for ps, gs, single in zip(singles, grads, apart, strict=True):
            problems.set_gradients(ps, gs)
            single.step()
    for run, ps in enumerate(singles):
        for a, b, p0 in zip(together, ps, start[run], strict=True):
            moved_alike(a[run], b, p0, 1e-9)


def test_runs_can_be_saved_in_the_middle() -> None:
    def build(steps: range) -> tuple[list[nn.Parameter], Any]:
        params = [nn.Parameter(torch.ones(3, 4, 2)), nn.Parameter(torch.ones(3, 5))]
        optimizer = steepest.create("adamw", params, runs=3, **options_of("adamw", None))
        train(optimizer, params, steps, [p.shape for p in params])
        return params, optimizer

    whole, _ = build(range(6))
    half, optimizer = build(range(3))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    copied = [nn.Parameter(p.detach().clone()) for p in half]
    fresh = steepest.create("adamw", copied, runs=3)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    train(fresh, copied, range(3, 6), [p.shape for p in copied])
    assert_same_bits(copied, whole)


def test_runs_with_momentum_of_their_own() -> None:
    params = [nn.Parameter(torch.ones(2, 4))]
    momentum = torch.tensor([0.5, 0.9], dtype=torch.float64)
    optimizer = steepest.create("sgd", params, runs=2, lr=0.1, momentum=momentum)
    train(optimizer, params, range(2), [(2, 4)])
    assert not torch.equal(params[0][0], params[0][1])


def test_a_schedule_over_runs() -> None:
    """torch's schedulers set one number, so a schedule of per-run values is set by hand."""
    params = [nn.Parameter(torch.ones(2, 4))]
    lr = torch.tensor([0.1, 0.2], dtype=torch.float64)
    optimizer = steepest.create("sgd", params, runs=2, lr=lr)
    before = params[0].detach().clone()
    train(optimizer, params, [0], [(2, 4)])
    first = params[0].detach() - before
    optimizer.param_groups[0]["lr"] = 0.0 * lr
    between = params[0].detach().clone()
    train(optimizer, params, [1], [(2, 4)])
    assert first.abs().min() > 0
    assert torch.equal(params[0], between)


def test_runs_need_a_leading_dimension() -> None:
    with pytest.raises(UserError, match=r"leading dimension of 3.*\(2, 4\)"):
        steepest.create("adamw", [nn.Parameter(torch.ones(2, 4))], runs=3)


@pytest.mark.parametrize("runs", [None, 3])
def test_a_value_per_run_needs_as_many_runs(runs: int | None) -> None:
    params = [nn.Parameter(torch.ones(3, 4))]
    with pytest.raises(UserError, match="lr"):
        steepest.create("adamw", params, runs=runs, lr=torch.tensor([0.1, 0.2]))
