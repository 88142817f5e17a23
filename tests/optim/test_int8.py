"""Weights stored in int8: what reads them, what steps them, what saves them."""

from __future__ import annotations

import copy
import functools
import io
import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from int8_models import GROUP, ROLES, Experts, Small, assert_same, make, matrices, pair, train
from torch import Tensor, nn
from torch.nn import functional

import steepest
from steepest import int8_weights
from steepest.errors import UserError
from steepest.optim import Int8Weight, stepping
from steepest.optim.grid import from_grid, to_grid
from steepest.optim.memory import held

METHODS = ("q_apollo", "q_galore")


def test_hidden_matrices_are_stored_and_nothing_else() -> None:
    stored, plain = pair()
    names = {"up.weight", "down.weight", "turned.weight", "experts.gate"}
    assert matrices(stored).keys() == names
    for name, p in matrices(stored).items():
        assert isinstance(p, nn.Parameter)
        assert p.codes.dtype is torch.uint8
        groups = -(-p.numel() // GROUP)
        assert p.stored_bytes() == p.numel() + 5 * groups
        assert (p.shape, p.dtype) == (plain.get_parameter(name).shape, torch.float32)


def test_rounded_to_nearest() -> None:
    weight = torch.randn(10, 7)
    layer = int8_weights(
        nn.Sequential(nn.Linear(7, 10)), group_size=14, roles={"0.weight": "hidden"}
    )
    layer.load_state_dict({"0.weight": weight, "0.bias": torch.zeros(10)})
    off = (layer[0].weight.dequantize() - weight).view(5, 14).abs().amax(1)
    ranges = weight.view(5, 14).amax(1) - weight.view(5, 14).amin(1)
    assert (off <= 0.501 * ranges / 255).all()


@pytest.mark.parametrize("name", METHODS)
def test_thirty_steps_are_those_of_float_weights_to_the_bit(name: str) -> None:
    stored, plain = pair()
    ours, theirs = make(name, stored), make(name, plain, group_size=GROUP)
    start = copy.deepcopy(stored)
    for step in range(30):
        train(stored, ours, range(step, step + 1))
        train(plain, theirs, range(step, step + 1))
        assert_same(stored, plain)
    for p, q in zip(matrices(stored).values(), matrices(start).values(), strict=True):
        assert type(p) is Int8Weight
        assert (p.codes != q.codes).float().mean() > 0.5
    assert ours.state_bytes() == theirs.state_bytes()


@pytest.mark.parametrize("name", METHODS)
def test_declared_bfloat16_is_stepped_in_float32(name: str) -> None:
    stored, wide = pair(dtype=torch.bfloat16)
    wide = wide.float()
    with torch.no_grad():
        for n, p in matrices(stored).items():
            wide.get_parameter(n).copy_(p.dequantize(torch.float32))
    ours, theirs = make(name, stored), make(name, wide, group_size=GROUP)
    for step in range(5):
        torch.manual_seed(step)
        for p, q in zip(stored.parameters(), wide.parameters(), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.float()
        ours.step()
        theirs.step()
    for n, p in matrices(stored).items():
        assert torch.equal(p.dequantize(torch.float32), wide.get_parameter(n))


@pytest.mark.parametrize("name", METHODS)
def test_steps_compile_once_to_the_same_numbers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: list[object] = []

    def backend(graph: torch.fx.GraphModule, inputs: Sequence[object]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    monkeypatch.setattr(stepping, "can_compile", lambda: True)
    stepping._compiled.cache_clear()
    torch.manual_seed(0)
    layers = nn.Sequential(*(nn.Linear(12, 12, bias=False) for _ in range(2)))
    roles = {"*": "hidden"}
    stored = int8_weights(copy.deepcopy(layers), group_size=GROUP, roles=roles)
    layers.load_state_dict(stored.state_dict())
    made = []
    for model, compiled in ((stored, True), (layers, False)):
        given = {"roles": roles, "group_size": GROUP, "compile": compiled, "rank": 3}
        optimizer = steepest.create(name, model, lr=0.02, **given)
        for _ in range(4):
            optimizer.zero_grad()
            model(torch.ones(12)).square().sum().backward()
            optimizer.step()
            made.append(len(graphs))
    assert_same(stored, layers)
    assert set(made) == {1}  # a stack of both
    stepping._compiled.cache_clear()


READERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "linear": functional.linear,
    "three dimensions": lambda x, w: functional.linear(x.view(2, 3, 8), w),
    "bias": lambda x, w: functional.linear(x, w, x.new_ones(8)),
    "transposed product": lambda x, w: x @ w.T,
    "product": lambda x, w: w @ x.mT,
    "addmm": lambda x, w: torch.addmm(x.new_ones(8), x, w.t()),
    "rows": lambda x, w: w[2:5].sum() * x + w.view(-1)[3],
    "chunks": lambda x, w: sum(x @ part.mT for part in w.chunk(2))[:, :4],
    "embedding": lambda x, w: functional.embedding(torch.tensor([1, 5, 1]), w),
    "norm": lambda x, w: x.sum() + w.square().sum() + torch.linalg.norm(w),
    "convolution": lambda x, w: functional.conv1d(x.view(1, 6, 8).mT, w.unsqueeze(-1)),
    "clone": lambda x, w: x @ w.clone() + (w.to(torch.float64)[0] + w.contiguous()[1]).float(),
    "turned": lambda x, w: x @ w.permute(1, 0).contiguous() + w.transpose(0, 1).clone()[0],
}


@pytest.mark.parametrize("read", READERS)
def test_operations_see_the_floats(read: str) -> None:
    torch.manual_seed(1)
    grid = to_grid(torch.randn(8, 8), 8, 16)
    found = []
    for made in (Int8Weight(grid, 16, torch.float32), from_grid(grid, 16)):
        w = nn.Parameter(made)
        x = torch.linspace(-1, 1, 48).view(6, 8).requires_grad_()
        y = READERS[read](x, w)
        y.square().sum().backward()
        found.append((y, w.grad, x.grad))
    for ours, theirs in zip(*found, strict=True):
        if theirs is not None:
            assert type(ours) is Tensor
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_autocast_casts_what_is_read() -> None:
    stored, plain = pair()
    for model in (stored, plain):
        with torch.autocast("cpu", torch.bfloat16):
            model(torch.arange(11)).backward()
    for p, q in zip(stored.parameters(), plain.parameters(), strict=True):
        assert type(p.grad) is Tensor
        assert p.grad.dtype is torch.float32
        torch.testing.assert_close(p.grad, q.grad, rtol=2e-2, atol=2e-3)


def test_a_compiled_model_computes_the_same() -> None:
    stored, plain = (model.experts for model in pair())
    traced = torch.compile(stored, backend="aot_eager", fullgraph=True)
    x = torch.randn(3, 12)
    for model in (traced, plain):
        model(x).square().sum().backward()
    torch.testing.assert_close(stored.gate.grad, plain.gate.grad)


def test_the_backward_pass_keeps_codes_not_floats() -> None:
    layer = int8_weights(nn.Sequential(nn.Linear(64, 48)), roles={"0.weight": "hidden"})
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(torch.randn(5, 64, requires_grad=True)).sum().backward()
    large = [t for t in kept if t.numel() == 64 * 48]
    assert large
    assert all(type(t) is Int8Weight for t in large)


def loaded(saved: Any) -> Any:
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def through_a_file(model: nn.Module) -> nn.Module:
    other, _ = pair()
    with torch.no_grad():
        for p in other.parameters():
            p.copy_(torch.randn(p.shape))
    other.load_state_dict(loaded(model.state_dict()))
    return other


def through_meta(model: nn.Module) -> nn.Module:
    empty = copy.deepcopy(model).to("meta")
    empty.load_state_dict(model.state_dict(), assign=True)
    return empty


COPIES: dict[str, Callable[[Any], nn.Module]] = {
    "file": through_a_file,
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "bfloat16 and back": lambda model: copy.deepcopy(model).to(torch.bfloat16).to(torch.float32),
    "meta": through_meta,
}


@pytest.mark.parametrize("how", COPIES)
def test_copies_have_the_same_codes(how: str) -> None:
    stored, _ = pair()
    train(stored, make("q_apollo", stored), range(3))  # ranges that rounding to nearest would move
    copied = COPIES[how](stored)
    assert matrices(copied).keys() == matrices(stored).keys()
    for name, p in matrices(copied).items():
        q = stored.get_parameter(name)
        assert isinstance(p, nn.Parameter)
        assert p.requires_grad
        for mine, theirs in zip(p.grid, q.grid, strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("how", ["file", "deepcopy"])
def test_saved_in_the_middle_no_bit_changes(name: str, how: str) -> None:
    whole, _ = pair()
    train(whole, make(name, whole), range(9))
    stored, _ = pair()
    optimizer = make(name, stored)
    train(stored, optimizer, range(5))
    if how == "file":
        resumed = through_a_file(stored)
        other = make(name, resumed, lr=0.5)
        other.load_state_dict(loaded(optimizer.state_dict()))
    else:
        resumed, other = copy.deepcopy((stored, optimizer))
    train(stored, optimizer, range(2))  # shares no memory with what goes on
    train(resumed, other, range(5, 9))
    for p, q in zip(matrices(resumed).values(), matrices(whole).values(), strict=True):
        assert torch.equal(p, q)


def test_copying_values_that_are_on_the_grid_changes_no_code() -> None:
    stored, _ = pair()
    train(stored, make("q_apollo", stored), range(3))
    before = copy.deepcopy(stored)
    with torch.no_grad():
        for p in matrices(stored).values():
            p.copy_(p.dequantize())
    for p, q in zip(matrices(stored).values(), matrices(before).values(), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(p.grid, q.grid, strict=True))
    p = matrices(stored)["up.weight"]
    values = p.dequantize()
    values[0, 0] = 10.0
    with torch.no_grad():
        p.copy_(values)
    torch.testing.assert_close(p.dequantize()[0, 0].item(), 10.0, rtol=5e-3, atol=0)
    assert torch.equal(p.view(-1)[GROUP:], values.view(-1)[GROUP:])


def test_values_that_are_not_finite_show() -> None:
    stored, _ = pair()
    optimizer = make("q_galore", stored)
    for p in stored.parameters():
        p.grad = torch.full_like(p, torch.nan)
    optimizer.step()
    assert all(p.isnan().all() for p in matrices(stored).values())


WRONG: dict[str, tuple[Callable[[Small], Any], str]] = {
    "adamw": (lambda m: steepest.create("adamw", m, roles=ROLES), r"adamw.*int8.*q_apollo and q"),
    "wrapped": (lambda m: make("q_galore", m, wrap="cautious"), r"cautious q_galore.*wrappers"),
    "group size": (lambda m: make("q_apollo", m, group_size=64), r"64.*groups of 32"),
    "torch": (lambda m: torch.optim.SGD([*backward(m)]).step(), r"in place.*copy_"),
    "initialisation": (lambda m: nn.init.zeros_(m.up.weight), r"zero_ writes to int8 weights"),
    "again": (lambda m: int8_weights(m, roles=ROLES), "stored in int8 already"),
    "no group": (lambda m: int8_weights(m, group_size=0), "at least 1"),
    "stack": (lambda m: int8_weights(Experts(), group_size=7), r"gate.*192.*7"),
    "nothing": (lambda m: int8_weights(nn.LayerNorm(4)), "no hidden matrix"),
}


def backward(model: nn.Module) -> Iterator[nn.Parameter]:
    model(torch.arange(11)).backward()
    return model.parameters()


@pytest.mark.parametrize("wrong", WRONG)
def test_what_can_not_be_is_said(wrong: str) -> None:
    stored, _ = pair()
    act, message = WRONG[wrong]
    with pytest.raises(UserError, match=message):
        act(stored)


def test_runs_and_a_group_size_that_changes_are_refused() -> None:
    stored, _ = pair()
    grouped = [{"params": [stored.experts.gate], "role": "hidden"}]
    with pytest.raises(UserError, match="runs"):
        steepest.create("q_apollo", grouped, runs=3)
    optimizer = make("q_apollo", stored)
    train(stored, optimizer, range(1))
    for group in optimizer.param_groups:
        if "group_size" in group:
            group["group_size"] = 16
    with pytest.raises(UserError, match="groups of 32"):
        train(stored, optimizer, range(1, 2))


@pytest.mark.parametrize("name", METHODS)
def test_memory_counts_what_training_holds(name: str) -> None:
    stored, plain = pair(64)
    optimizer = make(name, stored)
    train(stored, optimizer, range(1))
    rows = {
        row.role: row
        for row in held(name, plain, roles=ROLES, rank=3, update_interval=4, group_size=64)
    }
    sizes = [(p.numel(), -(-p.numel() // 64)) for p in matrices(stored).values()]
    assert rows["hidden"].parameter_bytes == sum(n + 5 * groups for n, groups in sizes)
    assert rows["hidden"].gradient_bytes == 4 * sum(n for n, _ in sizes)
    assert rows["head"].parameter_bytes == 4 * 16 * 11
    assert sum(row.state_bytes for row in rows.values()) == optimizer.state_bytes()
    assert [*rows.values()] == held(name, stored, roles=ROLES, rank=3, update_interval=4)
    assert type(plain.up.weight) is nn.Parameter
