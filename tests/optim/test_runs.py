"""K runs of a sweep in one optimizer."""

from __future__ import annotations

import io
import math
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
    sample,
    shapes_of,
    train,
)
from torch import nn

import steepest
from steepest.errors import UserError
from steepest.optim import buckets, stepping

PER_RUN: dict[str, dict[str, Any]] = {
    "sgd": {},
    "lars": {"momentum": [0.8, 0.9, 0.95], "trust_coefficient": [1e-3, 1e-2, 0.1]},
    "signsgd": {},
    "signum": {"momentum": [0.8, 0.9, 0.95]},
    "lion": {"betas": (0.9, [0.95, 0.98, 0.99])},
    "adamw": {"betas": ([0.8, 0.9, 0.95], [0.9, 0.95, 0.99]), "eps": [1e-8, 1e-6, 1e-4]},
    "adam": {"betas": ([0.8, 0.9, 0.95], [0.9, 0.95, 0.99])},
    "nadam": {"momentum_decay": [0.0, 4e-3, 0.5]},
    "nadamw": {"betas": ([0.8, 0.9, 0.95], 0.99), "momentum_decay": [0.0, 4e-3, 0.5]},
    "adagrad": {"initial_accumulator": [0.0, 0.1, 1.0]},
    "adagrad_norm": {"initial_accumulator": [0.01, 0.1, 1.0]},
    "rmsprop": {"alpha": [0.9, 0.95, 0.99], "momentum": [0.5, 0.9, 0.95]},
    "radam": {"betas": (0.9, [0.5, 0.9, 0.95])},
    "adabelief": {"betas": (0.9, [0.5, 0.9, 0.95])},
    "laprop": {"betas": ([0.8, 0.9, 0.95], [0.9, 0.95, 0.99])},
    "diffgrad": {"betas": ([0.8, 0.9, 0.95], [0.9, 0.95, 0.99])},
    "adafactor": {"clip_threshold": [0.5, 1.0, 2.0], "decay_rate": [0.7, 0.8, 0.9]},
    "d_muon": {"momentum": [0.8, 0.9, 0.95], "adam_betas": ([0.8, 0.9, 0.95], 0.95)},
    "normuon": {"momentum": [0.8, 0.9, 0.95], "beta2": [0.8, 0.9, 0.95]},
    "ortho_adam": {"betas": ([0.8, 0.9, 0.95], [0.9, 0.95, 0.99])},
    "mudam": {"momentum": [0.8, 0.9, 0.95], "eps": [1e-5, 1e-4, 1e-3]},
    "dion": {"momentum": [0.8, 0.9, 0.95]},
    "scion": {"momentum": [0.1, 0.2, 0.5], "scale": [1.0, 2.0, 5.0]},
    "scion_light": {"momentum": [0.1, 0.2, 0.5], "scale": [1.0, 2.0, 5.0]},
    "rmnp": {"momentum": [0.8, 0.9, 0.95], "eps": [1e-12, 1e-2, 1.0]},
    "swan": {"beta": [0.5, 0.6, 0.8], "scale": [0.05, 0.1, 0.2]},
    "sinkgd": {"scale": [0.05, 0.1, 0.2], "eps": [1e-8, 1e-2, 1.0]},
    "scale": {"momentum": [0.5, 0.8, 0.9], "eps": [1e-8, 1e-2, 1.0]},
    "muon": {"momentum": [0.8, 0.9, 0.95], "adam_betas": ([0.8, 0.9, 0.95], 0.95)},
    "soap": {"betas": ([0.8, 0.9, 0.95], [0.9, 0.95, 0.99])},
    "shampoo": {"betas": ([0.8, 0.9, 0.95], [0.9, 0.95, 0.99]), "eps": [1e-2, 1e-1, 1.0]},
    "kron": {"precond_lr": [0.05, 0.1, 0.3], "precond_init_scale": [0.5, 1.0, 2.0]},
    "cosmos": {"betas": ([0.8, 0.9, 0.95], [0.9, 0.95, 0.99]), "gamma": [0.05, 0.1, 0.3]},
    "sgg_adamw": {"betas": ([0.8, 0.9, 0.95], 0.99), "beta3": [0.5, 0.7, 0.9]},
    "sgg_lamb": {"betas": (0.9, [0.9, 0.95, 0.99]), "scale_bound": (0.1, [1.5, 2.0, 10.0])},
    "sgg_shampoo": {"betas": ([0.8, 0.9, 0.95], 0.99), "beta3": [0.5, 0.7, 0.9]},
    "came": {"clip_threshold": [0.5, 1.0, 2.0], "betas": ([0.8, 0.9, 0.95], 0.99, 0.999)},
    "adam_mini": {"betas": ([0.8, 0.9, 0.95], [0.9, 0.95, 0.99]), "eps": [1e-8, 1e-6, 1e-4]},
    "adam8bit": {"betas": ([0.8, 0.9, 0.95], [0.9, 0.95, 0.99])},
    "lion8bit": {"betas": (0.9, [0.95, 0.98, 0.99])},
    "sophia_g": {"betas": ([0.8, 0.9, 0.95], [0.9, 0.95, 0.99]), "rho": [0.01, 0.1, 1.0]},
    "prodigy": {"d0": [1e-4, 1e-3, 1e-2], "growth_rate": [1.1, 1.5, math.inf]},
    "schedulefree_adamw": {"betas": ([0.8, 0.9, 0.95], [0.9, 0.95, 0.99]), "r": [0.0, 1.0, 2.0]},
    "schedulefree_sgd": {"momentum": [0.8, 0.9, 0.95], "weight_lr_power": [0.0, 1.0, 2.0]},
    "adamp": {"delta": [0.1, 1.0, 10.0], "wd_ratio": [0.1, 0.5, 1.0]},
    "adan": {"betas": (0.98, [0.8, 0.9, 0.95], 0.99)},
    "adopt": {"betas": ([0.8, 0.9, 0.95], 0.99), "eps": [1e-6, 1e-3, 1e-1]},
    "ademamix": {"alpha": [1.0, 2.0, 8.0], "betas": (0.9, 0.99, [0.9, 0.99, 0.999])},
    "lamb": {"betas": ([0.8, 0.9, 0.95], [0.9, 0.95, 0.99])},
    "novograd": {"betas": ([0.8, 0.9, 0.95], [0.9, 0.95, 0.99])},
    "exadam": {"betas": ([0.8, 0.9, 0.95], [0.9, 0.95, 0.99])},
    "scaled_adam": {"scale_lr": [0.01, 0.1, 1.0], "max_rms": [0.1, 0.5, 3.0]},
    "stable_spam": {"gammas": ([0.5, 0.7, 0.9], 0.9, [0.9, 0.99, 0.999])},
    "mars_adamw": {"betas": ([0.8, 0.9, 0.95], 0.99), "gamma": [0.0, 0.025, 0.1]},
    "mars_lion": {"momentum": [0.8, 0.9, 0.95], "gamma": [0.0, 0.025, 0.1]},
    "mars_shampoo": {"momentum": [0.8, 0.9, 0.95], "gamma": [0.0, 0.025, 0.1]},
    "galore_adamw": {"scale": [0.2, 0.5, 1.0], "betas": ([0.8, 0.9, 0.95], 0.95)},
    "galore_adafactor": {"scale": [0.2, 0.5, 1.0], "decay_rate": [0.7, 0.8, 0.9]},
    "galore_adamw8bit": {"scale": [0.2, 0.5, 1.0], "betas": ([0.8, 0.9, 0.95], 0.95)},
    "fira": {"scale": [0.2, 0.5, 1.0], "growth_limit": [1.01, 1.1, 2.0]},
    "conda": {"scale": [0.2, 0.5, 1.0], "betas": ([0.8, 0.9, 0.95], 0.95)},
    "apollo": {"scale": [0.2, 0.5, 1.0], "growth_limit": [1.01, 1.1, 2.0]},
    "apollo_mini": {"betas": ([0.8, 0.9, 0.95], 0.95), "eps": [1e-8, 1e-6, 1e-4]},
    "q_apollo": {"scale": [0.2, 0.5, 1.0], "growth_limit": [1.01, 1.1, 2.0]},
    "q_galore": {"scale": [0.2, 0.5, 1.0], "betas": ([0.8, 0.9, 0.95], 0.95)},
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
    if "ns_dtype" in steepest.describe(name).hyperparameters:
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
        sample(optimizer)
        optimizer.step()
        for ps, gs, single in zip(singles, grads, apart, strict=True):
            problems.set_gradients(ps, gs)
            sample(single)
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
