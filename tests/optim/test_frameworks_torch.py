"""torch: an optimizer of ours under its schedulers, autocast, scaler and hooks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import problems
import pytest
import torch
from engine import assert_same_bits
from frameworks import OPTIONS, decline, make, moved_alike, weights
from torch.optim import lr_scheduler

import steepest

every = pytest.mark.parametrize("name", OPTIONS)

SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": decline,
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(
        o,
        max_lr=[0.05 * group["lr"] / o.param_groups[0]["lr"] for group in o.param_groups],
        total_steps=10,
        cycle_momentum="betas" in o.defaults,
    ),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=8, eta_min=1e-4),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o,
        [
            lr_scheduler.LinearLR(o, start_factor=0.1, total_iters=3),
            lr_scheduler.ExponentialLR(o, gamma=0.8),
        ],
        milestones=[3],
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.3, patience=1),
}


def scheduled(optimizer: Any, model: Any, schedule: Callable[[Any], Any]) -> list[list[float]]:
    """Train under a schedule; return the learning rates of all groups at each step."""
    scheduler, rates = schedule(optimizer), []
    for batch in problems.batches(count=8):
        problems.backward(model, batch)
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
            scheduler.step(1.0)
        else:
            scheduler.step()
    return rates


@pytest.mark.parametrize("kind", SCHEDULES)
def test_adamw_under_a_schedule_is_torchs(kind: str) -> None:
    ours, theirs = problems.llama(), problems.llama()
    start = weights(ours)
    # A small eps would magnify the rounding of gradients near zero.
    options = {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-4}
    # Decay of all parameters in one group, as torch's.
    optimizer = steepest.create("adamw", ours, **options, decay_roles=list(steepest.Role))
    rates = scheduled(optimizer, ours, SCHEDULES[kind])
    torchs = torch.optim.AdamW(theirs.parameters(), **options)
    assert scheduled(torchs, theirs, SCHEDULES[kind]) == rates
    assert len({rate for step in rates for rate in step}) > 2
    moved_alike(weights(ours), weights(theirs), start)


@pytest.mark.parametrize("kind", SCHEDULES)
def test_muon_under_a_schedule_is_muon_with_its_learning_rates(kind: str) -> None:
    model, by_hand = problems.llama(), problems.llama()
    rates = scheduled(make("muon", model), model, SCHEDULES[kind])
    other = make("muon", by_hand)
    for batch, now in zip(problems.batches(count=8), rates, strict=True):
        problems.backward(by_hand, batch)
        for group, rate in zip(other.param_groups, now, strict=True):
            group["lr"] = rate
        other.step()
    assert_same_bits(weights(model), weights(by_hand))
    first, last = rates[0], rates[-1]
    assert first != last
    if kind in ("LambdaLR", "OneCycleLR", "ReduceLROnPlateau"):  # Groups keep their proportions.
        assert last[1] / last[0] == pytest.approx(first[1] / first[0])


@every
def test_autocast_without_a_scaler(name: str) -> None:
    model = problems.llama()
    optimizer = make(name, model)
    losses = []
    for batch in problems.batches(count=1) * 25:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model.loss(*batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1
    held = [v for own in optimizer.state.values() for v in own.values() if torch.is_tensor(v)]
    for tensor in [*model.parameters(), *held]:
        assert tensor.dtype == torch.float32
        assert tensor.isfinite().all()


@every
def test_a_grad_scaler_changes_nothing_and_skips_what_overflows(name: str) -> None:
    model, plain = problems.llama(), problems.llama()
    optimizer, other = make(name, model), make(name, plain)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for batch in problems.batches(count=3):
        problems.backward(plain, batch)
        other.step()
        optimizer.zero_grad()
        scaler.scale(model.loss(*batch)).backward()
        scaler.step(optimizer)
        scaler.update()
    assert_same_bits(weights(model), weights(plain))
    model.lm_head.weight.grad[0, 0] = torch.inf
    before = weights(model)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 512.0
    assert_same_bits(weights(model), before)


def test_hooks_of_torch() -> None:
    model = problems.llama()
    optimizer = make("muon", model)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    optimizer.register_state_dict_post_hook(lambda *_: calls.append("saved"))
    optimizer.register_load_state_dict_post_hook(lambda *_: calls.append("loaded"))
    problems.backward(model, problems.batches()[0])
    optimizer.step()
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert calls == ["before", "after", "saved", "loaded"]
