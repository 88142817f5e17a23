"""The dynamics of a step against their definitions in NumPy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import steepest
from steepest.train.dynamics import effective_rank, measure, momentum_of, singular_values


def numbers(shape: tuple[int, ...], seed: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).standard_normal(shape)


@pytest.mark.parametrize("shape", [(), (7,), (5, 9), (9, 5), (3, 6, 4)])
def test_definitions(shape: tuple[int, ...]) -> None:
    w, g, m = (numbers(shape, seed) for seed in (1, 2, 3))
    d = -0.01 * g - 0.02 * w + 0.003 * numbers(shape, 4)
    found = measure(
        *(torch.as_tensor(x) for x in (w, w + d, g, m)), matrices=len(shape) > 1
    ).as_record()

    def norm(x: np.ndarray[Any, Any]) -> float:
        return float(np.sqrt((x**2).sum()))

    cosine = float((w * (w + d)).sum()) / norm(w) / norm(w + d)
    expected = {
        "weight_norm": norm(w),
        "gradient_norm": norm(g),
        "update_norm": norm(d),
        "relative_update": norm(d) / norm(w),
        "angular_update": math.acos(min(1.0, max(-1.0, cosine))),
        "gradient_momentum_alignment": float((g * m).sum()) / norm(g) / norm(m),
        "sign_agreement": float((np.sign(d) == -np.sign(g)).mean()),
    }
    if len(shape) > 1:
        s = np.linalg.svd(w, compute_uv=False)
        p = np.linalg.svd(d, compute_uv=False)
        p /= p.sum(-1, keepdims=True)
        expected["spectral_norm"] = s.max()
        expected["stable_rank"] = ((s**2).sum(-1) / s.max(-1) ** 2).mean()
        expected["update_effective_rank"] = np.exp(-(p * np.log(p)).sum(-1)).mean()
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-7)


def test_small_angles_are_not_lost_to_rounding() -> None:
    w = torch.tensor([3.0, 0.0], dtype=torch.float64)
    turned = torch.tensor([3.0, 3e-10], dtype=torch.float64)
    found = measure(w, turned, None, None, matrices=False)
    assert found.angular_update == pytest.approx(1e-10, rel=1e-9)
    assert measure(w, -2 * w, None, None, matrices=False).angular_update == math.pi


def test_effective_rank_counts_equal_directions() -> None:
    q, _ = np.linalg.qr(numbers((8, 8), 5))
    for rank in (1, 3, 8):
        values = singular_values(torch.as_tensor(1e-30 * q[:, :rank] @ q[:, :rank].T))
        assert effective_rank(values).item() == pytest.approx(rank, rel=1e-5)


def test_what_is_not_defined_is_left_out() -> None:
    zero, one = torch.zeros(2, 3), torch.ones(2, 3)
    unmoved = measure(one, one, zero, one, matrices=True).as_record()
    assert unmoved.keys() & {
        "sign_agreement", "gradient_momentum_alignment", "update_effective_rank"
    } == set()  # fmt: skip
    assert (unmoved["relative_update"], unmoved["stable_rank"]) == (0, pytest.approx(1))
    fresh = measure(zero, one, None, None, matrices=True).as_record()
    assert set(fresh) == {
        "weight_norm", "update_norm", "spectral_norm", "update_effective_rank"
    }  # fmt: skip
    broken = measure(one, one * math.nan, one * math.inf, None, matrices=True).as_record()
    assert broken == {"weight_norm": pytest.approx(6**0.5)}


def test_the_momentum_of_a_state() -> None:
    p, low = torch.ones(4, 3), torch.ones(2, 3)
    for name in ("momentum", "exp_avg", "momentum_buffer"):
        assert momentum_of({name: p, "exp_avg_sq": low}, p.shape) is p
        assert momentum_of({name: low}, p.shape) is None
    assert momentum_of({"exp_avg": p, "projection": p}, p.shape) is None
    assert momentum_of({"momentum_buffer": None}, p.shape) is None
    assert momentum_of({}, p.shape) is None


def test_the_momentum_of_the_catalogue_is_along_the_gradients_that_it_has_seen() -> None:
    """All gradients are one, so the momentum is along it, wherever the rule keeps one to compare.

    Ranks are as large as the matrix, so that shapes alone don't tell a projected momentum.
    """
    normalised = {"laprop", "adopt", "came"}  # average gradients over their size
    compared = set()
    for name in steepest.names():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(256, 256, bias=False), nn.Linear(256, 8, bias=False))
        optimizer = steepest.create(name, model, roles={"0.weight": "hidden", "1.weight": "head"})
        p = model[0].weight
        gradients = {q: torch.randn(q.shape) for q in model.parameters()}
        for _ in range(2):
            for q, gradient in gradients.items():
                q.grad = gradient.clone()
            if optimizer.wants():
                optimizer.observe(batch_tokens=1)
                for q, gradient in gradients.items():
                    q.grad = gradient.clone()
            optimizer.step()
        momentum = momentum_of(optimizer.state[p], p.shape)
        if momentum is not None:
            compared.add(name)
            found = measure(p, p, gradients[p], momentum, matrices=False)
            least = 0.7 if name in normalised else 0.9999
            assert (found.gradient_momentum_alignment or 0) > least, name
    assert {"adamw", "muon", "soap", "lion", *normalised} <= compared
    assert compared.isdisjoint({"apollo", "galore_adamw", "adam8bit", "signsgd", "scale"})
