"""Rules whose state is what they leave in the gradients."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import problems
import pytest
import torch
from engine import assert_same_bits, make, moved_alike
from made_up_rules import SHAPES, Halving
from torch import Tensor, nn

import steepest

GRADS = list(problems.stream(6, SHAPES))

Clear = Callable[[steepest.Optimizer, Sequence[Tensor]], None]
CLEAR: dict[str, Clear] = {
    "never": lambda optimizer, params: None,
    "optimizer": lambda optimizer, params: optimizer.zero_grad(),
    "optimizer, in place": lambda optimizer, params: optimizer.zero_grad(set_to_none=False),
    "by hand": lambda optimizer, params: clear(params),
}


def clear(params: Sequence[Tensor]) -> None:
    for p in params:
        p.grad = None


def backward(params: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    """Add gradients as a backward pass does."""
    torch.stack([(p * g).sum() for p, g in zip(params, grads, strict=True)]).sum().backward()


def halved(clearing: str, steps: range, made: Any = None) -> tuple[list[nn.Parameter], Any]:
    params = problems.parameters(shapes=SHAPES) if made is None else made[0]
    optimizer = steepest.create(Halving(), params) if made is None else made[1]
    for step in steps:
        CLEAR[clearing](optimizer, params)
        backward(params, GRADS[step])
        optimizer.step()
    return params, optimizer


@pytest.mark.parametrize("clearing", CLEAR)
def test_what_is_left_is_added_to_the_next_however_gradients_are_cleared(clearing: str) -> None:
    params, _ = halved(clearing, range(6))
    for i, (p, p0) in enumerate(zip(params, problems.parameters(shapes=SHAPES), strict=True)):
        total, x = torch.zeros_like(p0), p0.detach().clone()
        for grads in GRADS:
            total = total / 2 + grads[i]
            x -= 0.1 * total
        torch.testing.assert_close(p.detach(), x)


def test_a_loop_that_never_clears_needs_no_memory_beside_the_gradients() -> None:
    params, optimizer = halved("never", range(2))
    for p in params:
        assert p.grad is not None
        assert optimizer._kept.values[p].data_ptr() == p.grad.data_ptr()


@pytest.mark.parametrize("how", ["file", "deepcopy", "pickle"])
@pytest.mark.parametrize("clearing", ["never", "optimizer"])
def test_it_is_saved(clearing: str, how: str) -> None:
    whole, _ = halved(clearing, range(6))
    params, optimizer = halved(clearing, range(3))
    CLEAR[clearing](optimizer, params)
    made: Any
    if how == "file":
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        fresh = [nn.Parameter(p.detach().clone()) for p in params]
        made = fresh, steepest.create(Halving(), fresh)
        backward(fresh, GRADS[0])  # Gradients from before are not of the state that is loaded.
        made[1].load_state_dict(torch.load(file, weights_only=True))
    elif how == "deepcopy":
        made = copy.deepcopy((params, optimizer))
    else:
        made = pickle.loads(pickle.dumps((params, optimizer)))
    halved(clearing, range(3), (params, optimizer))  # shares no memory
    halved(clearing, range(3, 6), made)
    assert_same_bits(made[0], whole)


def test_gradients_in_buffers_that_are_used_again() -> None:
    # As those of DistributedDataParallel(gradient_as_bucket_view=True).
    whole, _ = halved("by hand", range(4))
    params = problems.parameters(shapes=SHAPES)
    optimizer = steepest.create(Halving(), params)
    buffer = torch.zeros(sum(p.numel() for p in params))
    views = torch.split(buffer, [p.numel() for p in params])
    for grads in GRADS[:4]:
        for p, view, g in zip(params, views, grads, strict=True):
            p.grad = view.view(p.shape).copy_(g)
        optimizer.step()
    assert_same_bits(params, whole)


def test_extra_gradients_are_not_taken_for_it() -> None:
    params, optimizer = halved("optimizer", range(2))
    optimizer.zero_grad()
    backward(params, GRADS[5])
    optimizer.observe()
    assert all(p.grad is None for p in params)
    halved("optimizer", range(2, 4), (params, optimizer))
    assert_same_bits(params, halved("optimizer", range(4))[0])


def test_a_parameter_without_a_new_gradient_stays_as_it_is() -> None:
    params, optimizer = halved("optimizer", range(2))
    before = [p.detach().clone() for p in params]
    optimizer.zero_grad()
    optimizer.step()
    assert_same_bits(params, before)


def test_clipped_and_cleared_scion_light_is_scion() -> None:
    results = []
    for name in ("scion", "scion_light"):
        params = problems.parameters(torch.float64, SHAPES)
        optimizer = make(name, params, ns_dtype="float64")
        for step in range(6):
            optimizer.zero_grad()
            # Of sizes that clipping makes equal, so that clipping the sum would show.
            backward(params, [10.0 ** (step % 3) * g.double() for g in GRADS[step]])
            torch.nn.utils.clip_grad_norm_(params, 1.0)
            optimizer.step()
        results.append(params)
    for a, b, p0 in zip(*results, problems.parameters(torch.float64, SHAPES), strict=True):
        moved_alike(a.detach(), b.detach(), p0, 1e-3)  # eps is added to norms of another scale
