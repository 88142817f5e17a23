"""Wrappers that round bfloat16 parameters their own way: the same bits as the references'."""

from __future__ import annotations

from typing import Any

import harness
import numpy as np
import optimi
import problems
import pytest
import torch
from harness import Case, Followed
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

import steepest

STEPS = 32


def followed(case: Case, *, schedule: bool = True) -> tuple[Followed, dict[Tensor, Any]]:
    """Return optimizer and references after some steps from equal parameters, and those."""
    params = problems.parameters(torch.bfloat16)
    optimizer = harness.make(case, problems.with_roles(params), case.decay, torch.float32)
    scheduler = LambdaLR(optimizer, problems.cosine if schedule else problems.constant)
    start = harness.snapshot(params)
    both = Followed(case, optimizer)
    for drawn in problems.stream(STEPS):
        grads = [g.bfloat16().float() for g in drawn]
        both.read_lrs()
        problems.set_gradients(params, grads)
        optimizer.step()
        scheduler.step()
        both.step(dict(zip(params, grads, strict=True)))
    return both, start


@pytest.mark.parametrize(
    ("name", "hyper"), [("adamw", {"lr": 3e-3}), ("sgd", {"lr": 0.05})], ids=["adamw", "sgd"]
)
def test_stochastic_rounding_to_the_bit(name: str, hyper: dict[str, Any]) -> None:
    both, _ = followed(Case(name, hyper, wrap=("stochastic_rounding",)))
    margins = both.margins()
    total = undecided = 0
    for p, x in both.values().items():
        # Float32's last places decide some roundings; from then on such an element is another.
        sure = torch.as_tensor(margins[p] > 16 * 2.0**-24)
        total += sure.numel()
        undecided += int((~sure).sum())
        assert torch.equal(p.detach()[sure].double(), torch.from_numpy(x)[sure])
    assert undecided < 0.03 * total


def test_kahan_summation_to_the_bit() -> None:
    # Without momentum and decay, and lr a power of two, float32 makes the steps exactly.
    case = Case("sgd", {"lr": 2.0**-6, "momentum": 0.0}, wrap=("kahan",), decay=0.0)
    both, _ = followed(case, schedule=False)
    for p, x in both.values().items():
        assert torch.equal(p.detach().double(), torch.from_numpy(x))
        held = both.optimizer.state[p]["held_back"].double().numpy()
        np.testing.assert_array_equal(held, both.single[p].c)


def test_kahan_summation_is_that_of_optimi() -> None:
    ours, theirs = problems.parameters(torch.bfloat16), problems.parameters(torch.bfloat16)
    lr = 2.0**-6
    optimizer = steepest.create("sgd", ours, wrap="kahan", lr=lr, momentum=0.0, weight_decay=0.0)
    other = optimi.SGD(theirs, lr=lr, momentum=0.0, kahan_sum=True, foreach=False, triton=False)
    for grads in problems.stream(STEPS):
        for params in (ours, theirs):
            problems.set_gradients(params, grads)
        optimizer.step()
        other.step()
    for p, q in zip(ours, theirs, strict=True):
        assert torch.equal(p, q)


def test_kahan_summation_around_adamw() -> None:
    # A tie that float32 breaks otherwise moves the parameter by 2^-8 and what is held back against
    # it: so their sum is compared.
    both, start = followed(Case("adamw", {"lr": 3e-3}, wrap=("kahan",)))
    for p, reference in both.single.items():
        total = p.detach().double() + both.optimizer.state[p]["held_back"].double()
        theirs = torch.as_tensor(reference.total())
        moved = theirs - torch.as_tensor(start[p])
        assert (total - theirs).norm() < 2e-3 * moved.norm()


@pytest.mark.parametrize("wrap", ["stochastic_rounding", "kahan"])
def test_float32_parameters_are_left_alone(wrap: str) -> None:
    plain, wrapped = problems.parameters(), problems.parameters()
    optimizers = [steepest.create("adamw", plain), steepest.create("adamw", wrapped, wrap=wrap)]
    for grads in problems.stream(8):
        for params, optimizer in zip((plain, wrapped), optimizers, strict=True):
            problems.set_gradients(params, grads)
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(plain, wrapped, strict=True))
