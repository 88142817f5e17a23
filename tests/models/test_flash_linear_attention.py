"""The choice between our recurrences and flash-linear-attention's kernels, and their equality."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from steepest.models import flash_linear_attention, recurrences
from steepest.models.recurrences import step_by_step

Inputs = dict[str, Tensor]
KERNELS = {
    "chunk_gla": recurrences.gated_linear_attention,
    "chunk_delta_rule": recurrences.delta_rule,
    "chunk_gated_delta_rule": recurrences.delta_rule,
}
each_kernel = pytest.mark.parametrize("kernel", KERNELS)


def draw(kernel: str, time: int, key: int = 8, value: int = 6) -> Inputs:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(2, time, 3, *shape, generator=generator)

    q, k = (F.normalize(normal(key), dim=-1) for _ in range(2))
    inputs = {"q": q, "k": k, "v": normal(value)}
    if kernel == "chunk_gla":
        return {**inputs, "log_decay": F.logsigmoid(normal(key)) / 16}
    inputs["beta"] = normal().sigmoid()
    if kernel == "chunk_gated_delta_rule":
        inputs["log_decay"] = F.logsigmoid(normal())
    return inputs


def borders(time: int) -> Tensor:
    """Documents that begin at other places in each of two sequences."""
    places = torch.tensor([[0, 5, 6, time // 2], [0, 1, time // 3, time - 1]])
    return (torch.arange(time) >= places[..., None]).sum(1)


def results(
    function: Callable[..., Tensor], inputs: Inputs, segments: Tensor | None
) -> list[Tensor]:
    """The output, and the gradients of a random projection of it."""
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    output = function(**leaves, segments=segments)
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(output.shape, generator=generator).to(output.device)
    (output * weights).sum().backward()
    return [output, *(x.grad for x in leaves.values())]


class StandIn:
    """fla.ops with the calling conventions of version 0.4 and our definition as every kernel."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.module = ModuleType("fla.ops")
        for name in KERNELS:
            setattr(self.module, name, self.kernel(name))

    def kernel(self, name: str) -> Callable[..., tuple[Tensor, None]]:
        def run(
            q: Tensor,
            k: Tensor,
            v: Tensor,
            *,
            g: Tensor | None = None,
            beta: Tensor | None = None,
            cu_seqlens: Tensor | None = None,
        ) -> tuple[Tensor, None]:
            self.calls.append(name)
            segments = None
            if cu_seqlens is not None:
                assert len(q) == 1
                assert cu_seqlens.dtype == torch.int64
                places = torch.arange(q.shape[1])
                segments = torch.searchsorted(cu_seqlens, places, right=True)[None]
                assert cu_seqlens[-1] == q.shape[1]
            return step_by_step(q, k, v, beta=beta, log_decay=g, segments=segments), None

        return run


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """Kernels that run here, and tensors that are taken for those that they suit."""
    fla = StandIn()
    monkeypatch.setitem(sys.modules, "fla", ModuleType("fla"))
    monkeypatch.setitem(sys.modules, "fla.ops", fla.module)
    monkeypatch.setattr(flash_linear_attention, "_suits", lambda k, v: True)
    flash_linear_attention.operators.cache_clear()
    yield fla
    flash_linear_attention.operators.cache_clear()


@pytest.mark.parametrize("packed", [False, True])
@each_kernel
def test_kernels_get_their_arguments(stand_in: StandIn, kernel: str, packed: bool) -> None:
    inputs = draw(kernel, 20)
    segments = borders(20) if packed else None
    expected = results(step_by_step, inputs, segments)
    torch.testing.assert_close(results(KERNELS[kernel], inputs, segments), expected)
    assert stand_in.calls == [kernel]


def test_a_compiled_kernel_is_an_operator_with_a_gradient(stand_in: StandIn) -> None:
    inputs, segments = draw("chunk_gated_delta_rule", 20), borders(20)
    compiled = torch.compile(recurrences.delta_rule, fullgraph=True, backend="aot_eager")
    expected = results(step_by_step, inputs, segments)
    torch.testing.assert_close(results(compiled, inputs, segments), expected)
    assert stand_in.calls == ["chunk_gated_delta_rule"] * 2  # forward, and again for the gradient


def test_without_a_gpu_or_the_library_our_own_code_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    k = v = torch.zeros(1, 4, 2, 8, dtype=torch.bfloat16)
    assert not flash_linear_attention.serves(k, v)
    monkeypatch.setattr(flash_linear_attention, "_suits", lambda k, v: True)
    monkeypatch.setitem(sys.modules, "fla.ops", None)  # an import that fails
    flash_linear_attention.operators.cache_clear()
    assert not flash_linear_attention.serves(k, v)
    flash_linear_attention.operators.cache_clear()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("packed", [False, True])
@each_kernel
def test_kernels_equal_our_own_code(kernel: str, packed: bool) -> None:
    pytest.importorskip("fla.ops")
    gates = ("beta", "log_decay")
    inputs = {
        name: x.cuda().to(torch.float32 if name in gates else torch.bfloat16)
        for name, x in draw(kernel, 300, key=64, value=128).items()
    }
    segments = borders(300).cuda() if packed else None
    assert flash_linear_attention.serves(inputs["k"], inputs["v"])
    found = results(KERNELS[kernel], inputs, segments)
    exact = {name: x.float() for name, x in inputs.items()}
    for ours in (inputs, exact):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(flash_linear_attention, "_suits", lambda k, v: False)
            expected = results(KERNELS[kernel], ours, segments)
        for x, y in zip(found, expected, strict=True):
            assert (x - y).abs().max() < 0.03 * y.abs().max()
