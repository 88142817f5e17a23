"""Compiled steps: the same numbers, and no compilation that is not needed."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import problems
import pytest
import torch
from engine import LR, NAMES, assert_same_bits, make, moved_alike, train
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

import steepest
from steepest.optim import buckets, groups, stepping

# A pair, a matrix alone (which the stack may alias), a vector.
FEW: tuple[tuple[int, ...], ...] = ((6, 4), (6, 4), (3, 7), (5,))


@pytest.fixture(autouse=True)
def _fresh_kernels() -> Iterator[None]:
    stepping._compiled.cache_clear()
    yield
    stepping._compiled.cache_clear()


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Trace without generating code; the list grows with every graph."""
    seen: list[object] = []

    def backend(graph: torch.fx.GraphModule, inputs: Sequence[object]) -> Callable[..., Any]:
        seen.append(graph)
        return graph.forward

    traced = functools.partial(torch.compile, backend=backend)
    monkeypatch.setattr(torch, "compile", traced)
    monkeypatch.setattr(stepping, "can_compile", lambda: True)
    return seen


def both_ways(
    name: str, dtype: torch.dtype, shapes: Sequence[tuple[int, ...]] = FEW, **options: Any
) -> tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
    compiled, eager, start = (problems.parameters(dtype, shapes) for _ in range(3))
    for params, how in ((compiled, True), (eager, False)):
        opt = make(name, params, compile=how, **options)
        scheduler = LambdaLR(opt, problems.cosine)
        for grads in problems.stream(8, shapes):
            problems.set_gradients(params, grads)
            opt.step()
            scheduler.step()
    return compiled, eager, start


@pytest.mark.slow
def test_large_tensors_compiled_are_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    # Every rule is compiled in test_inductor_*.py, as small tensors: elementwise ones joined.
    monkeypatch.setattr(buckets, "SMALL", 11)
    for a, b, p0 in zip(*both_ways("adamw", torch.float32, FEW[1:]), strict=True):
        assert not torch.equal(b, p0)
        moved_alike(a, b, p0, 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("adamw", {"wrap": ["cautious"]}),
        ("muon", {"ns_dtype": "float64"}),
    ],
    ids=["cautious adamw", "muon"],
)
def test_compiled_is_eager_in_float64(name: str, options: dict[str, Any]) -> None:
    shapes = ((3, 7), (5,))
    for a, b, p0 in zip(*both_ways(name, torch.float64, shapes, **options), strict=True):
        moved_alike(a, b, p0, 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("wrap", ["stochastic_rounding", "kahan"])
def test_compiled_rounding_is_eager_to_the_bit(wrap: str) -> None:
    # A compiler leaves out a cast to bfloat16 and back, which the sums of Kahan are about.
    compiled, eager, _ = both_ways("adamw", torch.bfloat16, wrap=[wrap])
    assert_same_bits(compiled, eager)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "wrap"),
    [*((name, ()) for name in NAMES), ("adamw", ("cautious",)), ("muon", ("cautious",))],
)
def test_traced_is_eager(name: str, wrap: tuple[str, ...], graphs: list[object]) -> None:
    # More shapes, without the time of a C++ compiler: the graph is the same as what it compiles.
    shapes = ((5,), (6, 4), (6, 4), (6, 2, 3, 3))
    results = both_ways(name, torch.float64, shapes, wrap=wrap, **ns_dtype(name))
    assert 0 < len(graphs) <= 6  # two phases of three signatures; no schedule adds to that
    for a, b, p0 in zip(*results, strict=True):
        moved_alike(a, b, p0, 1e-9)


def ns_dtype(name: str) -> dict[str, Any]:
    known = steepest.describe(name).hyperparameters
    return {"ns_dtype": "float64"} if "ns_dtype" in known else {}


@pytest.mark.parametrize("name", ["sgd", "adamw", "adafactor", "muon", "soap", "prodigy"])
def test_changing_values_do_not_recompile(name: str, graphs: list[object]) -> None:
    params = problems.parameters(shapes=FEW)
    opt = make(name, params, compile=True)
    train(opt, params, [0, 1], FEW)
    first = len(graphs)
    assert first >= 1
    scheduler = LambdaLR(opt, problems.cosine)
    for step in range(2, 8):
        for group in opt.param_groups:
            group["weight_decay"] = 0.01 * step
            if "betas" in group:
                group["betas"] = (0.9 + 0.01 * step, *group["betas"][1:])
            if group.get("momentum"):  # 0 decides the state
                group["momentum"] = 0.9 + 0.01 * step
        train(opt, params, [step], FEW)
        scheduler.step()
    assert len(graphs) == first


def test_equal_chunks_share_a_graph(graphs: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buckets, "SMALL", 3)
    monkeypatch.setattr(buckets, "CHUNK", 2)
    shapes = ((4, 4),) * 7
    params = problems.parameters(shapes=shapes)
    train(make("adamw", params, compile=True), params, range(2), shapes)
    assert len(graphs) == 2  # Three chunks of two, one of one.


def test_many_shapes_of_one_rule_all_compile(
    graphs: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    # More than torch's limit of 8 variants of one code object.
    monkeypatch.setattr(buckets, "SMALL", 3)
    shapes = tuple((4, n) for n in range(2, 12))
    params = problems.parameters(shapes=shapes)
    train(make("adamw", params, compile=True), params, range(2), shapes)
    assert len(graphs) == len(shapes)


def test_groups_that_differ_in_values_share_a_graph(graphs: list[object]) -> None:
    params = problems.parameters(shapes=((4, 4), (4, 4)))
    groups = [{"params": [params[0]], "lr": 0.1}, {"params": [params[1]], "lr": 0.2}]
    opt = steepest.create("adamw", groups, compile=True)
    train(opt, params, range(2), ((4, 4), (4, 4)))
    assert len(graphs) == 1


def test_a_missing_gradient_does_not_recompile(graphs: list[object]) -> None:
    params, alone = problems.parameters(shapes=FEW), problems.parameters(shapes=FEW)
    opt, eager = make("adamw", params, compile=True), make("adamw", alone)
    train(opt, params, [0], FEW)
    train(eager, alone, [0], FEW)
    first = len(graphs)
    for step, grads in enumerate(problems.stream(5, FEW)):
        for tensors in (params, alone):
            problems.set_gradients(tensors, grads)
            tensors[step % 4].grad = None
        opt.step()
        eager.step()
    assert len(graphs) == first
    for a, b in zip(params, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "small"), [("adamw", 3), ("adamw", 100), ("muon", 100), ("adafactor", 100)]
)
def test_large_parameters_without_a_gradient_compile_once_more(
    name: str, small: int, graphs: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(buckets, "SMALL", small)
    monkeypatch.setattr(buckets, "ALONE", 3)
    monkeypatch.setattr(buckets, "ALONE_OF_STACK", 3)
    shapes = ((4, 6),) * 5
    params, alone, start = (problems.parameters(shapes=shapes) for _ in range(3))
    opt, eager = make(name, params, compile=True), make(name, alone)
    missing: tuple[tuple[int, ...], ...] = ((), (1,), (0, 3), (), (1, 2, 3, 4), (), ())
    counts = []
    for absent, grads in zip(missing, problems.stream(len(missing), shapes), strict=True):
        for tensors in (params, alone):
            problems.set_gradients(tensors, grads)
            for i in absent:
                tensors[i].grad = None
        opt.step()
        eager.step()
        counts.append(len(graphs))
    assert counts == [1] + [2] * 6  # the five together, and one alone
    for a, b, p0 in zip(params, alone, start, strict=True):
        moved_alike(a, b, p0, 1e-5)


@pytest.mark.parametrize(("name", "apart"), [("muon", False), ("adamw", True)])
def test_where_the_number_of_the_step_is_nothing_all_are_together_again(
    name: str, apart: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(buckets, "SMALL", 3)
    monkeypatch.setattr(buckets, "ALONE_OF_STACK", 3)
    shapes = ((4, 6),) * 5
    params = problems.parameters(shapes=shapes)
    opt = make(name, params)
    for step, grads in enumerate(problems.stream(2, shapes)):
        problems.set_gradients(params, grads)
        if step == 0:
            params[1].grad = None
        opt.step()
    problems.set_gradients(params, grads)
    turns = [turn for plan in opt._plans() for turn in plan.due(opt.state)]
    assert len(turns) == (5 if apart else 1)


@pytest.mark.slow
def test_runs_compile(graphs: list[object]) -> None:
    lr = torch.tensor([1e-3, 1e-2], dtype=torch.float64)
    shapes = ((2, 6, 4), (2, 6, 4), (2, 5))
    for name in ("adamw", "adafactor"):
        results = []
        for how in (True, False):
            params = problems.parameters(torch.float64, shapes)
            opt = steepest.create(name, params, lr=lr, runs=2, compile=how)
            train(opt, params, range(4), shapes)
            results.append(params)
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    assert graphs


def test_auto_compiles_large_models_alone(
    graphs: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    for limit, compiled in ((10_000, False), (10, True)):
        monkeypatch.setattr(groups, "COMPILE_ELEMENTS", limit)
        params = problems.parameters(shapes=FEW)
        train(make("lion", params, compile="auto"), params, [0], FEW)
        assert bool(graphs) == compiled


def test_without_a_compiler_it_warns_once_and_runs_eagerly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    eager, compiled = problems.parameters(shapes=FEW), problems.parameters(shapes=FEW)
    train(make("adamw", eager), eager, range(3), FEW)
    with pytest.warns(UserWarning, match=r"no-such-compiler.*eagerly"):
        train(make("adamw", compiled, compile=True, lr=LR), compiled, range(3), FEW)
    assert_same_bits(compiled, eager)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = problems.parameters(shapes=FEW)
        train(make("adamw", again, compile=True), again, range(3), FEW)
