"""Q-GaLore's own: refreshes that become rarer where the subspace has settled, packed codes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import steepest
from steepest.errors import UserError
from steepest.optim import stepping
from steepest.optim.grid import pack, unpack

OPTIONS = {"rank": 2, "update_interval": 2, "queue_size": 2, "compile": False}


def stepped(steps: int, **options: Any) -> tuple[list[nn.Parameter], steepest.Optimizer]:
    """Train two matrices of one shape, whose gradients keep their directions, and do not."""
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(40, 30)) for _ in range(2)]
    optimizer = steepest.create(
        "q_galore", [{"params": params, "role": "hidden"}], **{**OPTIONS, **options}
    )
    fixed = torch.randn(40, 30)
    for _ in range(steps):
        params[0].grad = fixed + 0.01 * torch.randn(40, 30)
        params[1].grad = torch.randn(40, 30)
        optimizer.step()
    return params, optimizer


def test_intervals_double_where_the_leading_vector_stays() -> None:
    # Refreshes at steps 1, 3, 5 have two cosines; then they are where 4, 8, 16 divide step - 1.
    for steps, factor in ((4, 1), (5, 2), (8, 2), (9, 4), (16, 4), (17, 8)):
        params, optimizer = stepped(steps)
        assert optimizer.state[params[0]]["intervals"] == factor
        assert optimizer.state[params[1]]["intervals"] == 1


def test_a_threshold_above_one_is_never_reached() -> None:
    params, optimizer = stepped(9, cos_threshold=1.1)
    assert [optimizer.state[p]["intervals"] for p in params] == [1, 1]


def test_what_is_not_due_is_not_decomposed(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []
    lazily = stepping._of_the_due

    def counted(rule: Any, layout: Any, runs: Any, prepare: Any) -> Any:
        def run(inputs: Any, v: Tensor) -> Any:
            counts.append(len(inputs.grads[0]))
            return prepare(inputs, v)

        return lazily(rule, layout, runs, run)

    stepping._eager.cache_clear()
    monkeypatch.setattr(stepping, "_of_the_due", counted)
    found, optimizer = stepped(18)
    # At steps 1, 3, ..., 17: both at first, then one alone where the other waits.
    assert counts == [2, 2, 2, 1, 2, 1, 1, 1, 2]
    stepping._eager.cache_clear()
    monkeypatch.setattr(stepping, "_of_the_due", lambda rule, layout, runs, prepare: prepare)
    all_the_same, other = stepped(18)
    stepping._eager.cache_clear()
    for p, q in zip(found, all_the_same, strict=True):
        assert torch.equal(p, q)
        for name, value in optimizer.state[p].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other.state[q][name]))


@pytest.mark.parametrize(("bits", "size"), [(4, 30), (3, 30), (5, 60), (8, 60)])
def test_the_projection_is_kept_in_few_bits(bits: int, size: int) -> None:
    params, optimizer = stepped(1, projection_bits=bits)
    codes = optimizer.state[params[0]]["projection"]
    assert codes.dtype is torch.uint8
    assert codes.numel() == size


@pytest.mark.parametrize("shape", [(3, 5), (4, 4), (1, 1)])
def test_packed_codes_come_back(shape: tuple[int, int]) -> None:
    codes = torch.randint(16, shape, dtype=torch.uint8)
    packed = pack(codes)
    assert packed.numel() == -(-codes.numel() // 2)
    assert torch.equal(unpack(packed, shape), codes)


@pytest.mark.parametrize(
    "wrong", [{"projection_bits": 9}, {"projection_bits": 0}, {"queue_size": 0}]
)
def test_wrong_hyperparameters_are_said(wrong: dict[str, int]) -> None:
    with pytest.raises(UserError, match="must be at least 1"):
        stepped(1, **wrong)
