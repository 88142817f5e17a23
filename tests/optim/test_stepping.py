"""Parameters that are alone, together, oddly shaped, or without a gradient."""

from __future__ import annotations

import copy

import problems
import pytest
import torch
from engine import (
    ELEMENTWISE,
    LR,
    NAMES,
    NEEDS_FULL_RANK,
    ROUNDED,
    SHARED,
    assert_same_bits,
    make,
    moved_alike,
    take_key,
    train,
    trained,
)
from torch import Tensor, nn

from steepest.optim import buckets, catalogue, stepping

# Weight decay joins the gradient.
COUPLED = {"lars", "adam", "nadam", "lamb", "sgg_lamb", "novograd"}
# Decay is another formula.
OWN_DECAY = {
    "adan",
    "adamp",
    "scion",
    "scion_light",
    "prodigy",
    "schedulefree_adamw",
    "schedulefree_sgd",
    *ROUNDED,
}


@pytest.mark.parametrize("name", [name for name in NAMES if name not in SHARED])
def test_stepped_together_as_one_by_one(name: str) -> None:
    together, whole = trained(name)
    alone, start = problems.parameters(), problems.parameters()
    optimizers = [make(name, [p]) for p in alone]
    for optimizer, mine, theirs in zip(optimizers, alone, together, strict=True):
        take_key(optimizer, mine, whole, theirs)
    for grads in problems.stream(8):
        problems.set_gradients(alone, grads)
        for optimizer in optimizers:
            optimizer.step()
    for a, b, p0 in zip(together, alone, start, strict=True):
        moved_alike(a, b, p0, 1e-5 if name == "soap" else 1e-6)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in SHARED])
def test_missing_gradients_leave_a_parameter_as_it_was(name: str) -> None:
    shapes = ((6, 4), (6, 4), (6, 4), (5,), (3,))
    present = [(0, 1, 2, 3, 4), (0, 2, 4), (1, 3), (0,), (0, 1, 2, 3, 4), (), (2, 3)]
    params, alone = problems.parameters(shapes=shapes), problems.parameters(shapes=shapes)
    start = problems.parameters(shapes=shapes)
    optimizer = make(name, params)
    single = [make(name, [p]) for p in alone]
    for each, mine, theirs in zip(single, alone, params, strict=True):
        take_key(each, mine, optimizer, theirs)
    for grads, there in zip(problems.stream(len(present), shapes), present, strict=True):
        optimizer.zero_grad(set_to_none=True)
        before = [(p.detach().clone(), copy.deepcopy(optimizer.state[p])) for p in params]
        for i in there:
            params[i].grad, alone[i].grad = grads[i].clone(), grads[i].clone()
        optimizer.step()
        for i in there:
            single[i].step()
        for i in set(range(len(params))) - set(there):
            value, state = before[i]
            assert torch.equal(params[i], value)
            assert all(
                torch.equal(torch.as_tensor(v), torch.as_tensor(optimizer.state[params[i]][k]))
                for k, v in state.items()
            )
    for i, (a, b, p0) in enumerate(zip(params, alone, start, strict=True)):
        assert optimizer.state[a]["step"] == sum(i in there for there in present)
        moved_alike(a, b, p0, 1e-5 if name == "soap" else 1e-6)


def test_missing_gradients_as_in_torch() -> None:
    params, theirs, start = (problems.parameters(torch.float64) for _ in range(3))
    optimizer = make("adamw", params)
    reference = torch.optim.AdamW(theirs, lr=LR, weight_decay=0.1)
    # Roles off: vectors decay in torch.
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.1
    for step, grads in enumerate(problems.stream(9)):
        for i, (p, q, g) in enumerate(zip(params, theirs, grads, strict=True)):
            p.grad = q.grad = None if (step * i) % 3 == 1 else g.double()
        optimizer.step()
        reference.step()
    for a, b, p0 in zip(params, theirs, start, strict=True):
        moved_alike(a, b, p0, 1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_without_any_gradient_changes_nothing(name: str) -> None:
    params = problems.parameters()
    before = [p.detach().clone() for p in params]
    optimizer = make(name, params)
    optimizer.step()
    assert_same_bits(params, before)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in COUPLED | OWN_DECAY])
def test_zero_gradients_give_decay_alone(name: str) -> None:
    params = problems.parameters()
    start = [p.detach().clone() for p in params]
    optimizer = make(name, params)
    for _ in range(5):
        problems.set_gradients(params, [torch.zeros_like(p) for p in params])
        optimizer.step()
    moves = 5 - catalogue.recipe(name).rule.starts()
    for p, p0 in zip(params, start, strict=True):
        shrunk = p0 * (1 - LR * 0.1) ** moves if p.ndim >= 2 else p0
        torch.testing.assert_close(p.detach(), shrunk, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_zero_gradients_after_a_while_keep_everything_finite(name: str) -> None:
    params, optimizer = trained(name, 3)
    for _ in range(12):
        problems.set_gradients(params, [torch.zeros_like(p) for p in params])
        optimizer.step()
    assert all(p.isfinite().all() for p in params)


@pytest.mark.parametrize("scale", [1e-12, 1e6])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_extreme_size_keep_everything_finite(name: str, scale: float) -> None:
    params = problems.parameters()
    optimizer = make(name, params, lr=1e-4)
    for grads in problems.stream(6):
        with_dead_row = [g * scale for g in grads]
        for g in with_dead_row:
            if g.ndim > 1:
                g[0] = 0
        problems.set_gradients(params, with_dead_row)
        optimizer.step()
    assert all(p.isfinite().all() for p in params)


@pytest.mark.parametrize("layout", ["params", "grads", "both", "channels_last"])
@pytest.mark.parametrize("name", NAMES)
def test_memory_layout_does_not_matter(name: str, layout: str) -> None:
    shapes = ((4, 3, 2, 2), (4, 3, 2, 2)) if layout == "channels_last" else ((6, 9), (6, 9), (9, 6))
    if name in NEEDS_FULL_RANK and layout != "channels_last":
        shapes = ((6, 6), (6, 6), (9, 9))
    rows, columns = problems.parameters(shapes=shapes), problems.parameters(shapes=shapes)

    def other(t: Tensor) -> Tensor:
        if layout == "channels_last":
            return t.detach().clone(memory_format=torch.channels_last)
        return t.detach().T.contiguous().T

    if layout != "grads":
        columns = [nn.Parameter(other(p)) for p in columns]
        assert not columns[0].is_contiguous()
    ours, theirs = make(name, columns), make(name, rows)
    start = problems.parameters(shapes=shapes)
    for grads in problems.stream(6, shapes):
        for p, q, g in zip(columns, rows, grads, strict=True):
            p.grad, q.grad = (g.clone() if layout == "params" else other(g)), g.clone()
        ours.step()
        theirs.step()
    for a, b, p0 in zip(columns, rows, start, strict=True):
        assert a.stride() == (a.stride() if layout == "grads" else other(b).stride())
        moved_alike(a, b, p0, 1e-5)


@pytest.mark.parametrize("name", ["adamw", "lion"])
def test_expanded_gradients(name: str) -> None:
    # The gradient of a sum is one number expanded: stride 0 everywhere.
    ours, theirs = nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(4, 3))
    for p in (ours, theirs):
        optimizer = make(name, [p])
        p.sum().backward()
        assert p.grad is not None
        if p is theirs:
            p.grad = p.grad.contiguous()
        optimizer.step()
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_blocks_and_size_classes_do_not_matter(
    name: str, contiguous: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, optimizer = trained(name)
    assert all(isinstance(b, buckets.Joined) for plan in optimizer._plans() for b in plan.buckets)
    monkeypatch.setattr(buckets, "SMALL", 11)
    monkeypatch.setattr(buckets, "CHUNK", 2)
    monkeypatch.setattr(stepping, "BLOCK", 13)
    params = problems.parameters()
    if not contiguous:
        params = [nn.Parameter(p.detach().T.contiguous().T) if p.ndim == 2 else p for p in params]
    optimizer = make(name, params)
    train(optimizer, params, range(8))
    kinds = {type(b) for plan in optimizer._plans() for b in plan.buckets}
    assert kinds == {buckets.Joined, buckets.Separate}
    for a, b in zip(params, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["muon", "soap", "adafactor"])
def test_stacks_of_bounded_size_do_not_matter(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = ((6, 4),) * 5
    whole, parts, start = (problems.parameters(shapes=shapes) for _ in range(3))
    train(make(name, whole), whole, range(6), shapes)
    monkeypatch.setitem(buckets.STACK_ELEMENTS, "cpu", 50)
    optimizer = make(name, parts)
    train(optimizer, parts, range(6), shapes)
    assert [len(b.pieces) for b in optimizer._plans()[0].buckets] == [2, 2, 1]
    for a, b, p0 in zip(parts, whole, start, strict=True):
        moved_alike(a, b, p0, 1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_large_elementwise_state_resumes_to_the_bit(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(buckets, "SMALL", 11)
    monkeypatch.setattr(stepping, "BLOCK", 13)
    whole, _ = trained(name, 6)
    params, optimizer = trained(name, 4)
    fresh = [nn.Parameter(p.detach().clone()) for p in params]
    resumed = make(name, fresh)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(resumed, fresh, [4, 5])
    assert_same_bits(fresh, whole)


@pytest.mark.parametrize("name", NAMES)
def test_tied_weights_are_stepped_once(name: str) -> None:
    tied = problems.llama(tie_embeddings=True)
    assert tied.lm_head.weight is tied.embed_tokens.weight
    optimizer = make(name, tied)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == len({id(p) for p in held}) == len(list(tied.parameters()))
    batch = problems.batches()[0]
    first = problems.backward(tied, batch)
    for _ in range(6):
        optimizer.step()
        last = problems.backward(tied, batch)
    assert optimizer.state[tied.lm_head.weight]["step"] == 6
    assert last < first
