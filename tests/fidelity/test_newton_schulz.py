"""Newton-Schulz with its default bfloat16 products, against products of float64."""

from __future__ import annotations

import harness
import problems
import pytest
import torch
from harness import Case, Followed
from measured import displacement_error, record
from torch.optim.lr_scheduler import LambdaLR

import steepest
from steepest.optim.linalg import QUINTICS, newton_schulz

STEPS = 32
SHAPES = ((16, 16), (24, 8), (8, 24))
CASES = [
    Case("muon", {"lr": 0.02}),
    Case("muon", {"lr": 0.02, "coefficients": "polar_express"}, "polar express"),
    Case("d_muon", {"lr": 3e-3}),
    Case("normuon", {"lr": 3e-3}),
    Case("ortho_adam", {"lr": 3e-3}),
    Case("scion", {"lr": 1e-3}),
    Case("scion_light", {"lr": 1e-3}),
    Case("mars_shampoo", {"lr": 3e-3}),
    Case("cosmos", {"lr": 3e-3}),
]


def test_every_method_with_products_of_bfloat16_is_here() -> None:
    rounded = {
        name
        for name in steepest.names()
        if steepest.describe(name).hyperparameters.get("ns_dtype", ("",))[0] == "bfloat16"
    }
    assert rounded == {case.name for case in CASES}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bfloat16_newton_schulz_is_near_the_float64_one(case: Case) -> None:
    params = problems.parameters(shapes=SHAPES)
    start = harness.snapshot(params)
    optimizer = harness.make(
        Case(case.name, {**case.hyper, "ns_dtype": "bfloat16"}),
        problems.with_roles(params),
        case.decay,
        torch.float32,
    )
    scheduler = LambdaLR(optimizer, problems.cosine)
    followed = Followed(case, optimizer)
    for grads in problems.stream(STEPS, SHAPES):
        followed.read_lrs()
        problems.set_gradients(params, grads)
        optimizer.step()
        scheduler.step()
        followed.step(dict(zip(params, grads, strict=True)))
    ours = [p.detach().double().numpy() for p in params]
    error = displacement_error(ours, [*followed.values().values()], [*start.values()])
    assert record(str(case), "bfloat16 Newton-Schulz, fixed gradients", error) < 5e-2


@pytest.mark.parametrize("coefficients", QUINTICS)
def test_singular_values_end_near_one(coefficients: str) -> None:
    # Bands are those known of five steps; Polar Express converges where there are more.
    rng = torch.Generator().manual_seed(0)
    matrix = torch.randn(40, 24, generator=rng, dtype=torch.float64)
    values = torch.linalg.svdvals(newton_schulz(matrix, 5, coefficients, torch.float64))
    low, high = {"jordan": (0.65, 1.2), "polar_express": (0.85, 1.15)}[coefficients]
    assert low < values.min()
    assert values.max() < high
    exact = newton_schulz(matrix, 12, coefficients, torch.float64)
    if coefficients == "polar_express":
        left, _, right = torch.linalg.svd(matrix, full_matrices=False)
        torch.testing.assert_close(exact, left @ right, rtol=1e-9, atol=1e-9)
