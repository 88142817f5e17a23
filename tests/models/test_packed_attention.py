"""Attention over packed documents: every kernel against attention by hand, and what it costs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from itertools import product

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import flex_attention as torch_flex

from steepest.models import (
    GPT2Config,
    LanguageModel,
    LlamaConfig,
    ModelConfig,
    MoEConfig,
    attention,
    build,
    document_attention,
    flex_attention,
)
from steepest.models import documents as packed

SMALL = {"vocab_size": 50, "hidden_size": 64, "heads": 4, "layers": 2, "max_sequence_length": 512}
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def layouts(time: int) -> Tensor:
    """Rows of one document, of documents of a token, of random ones, and with padding behind."""
    generator = torch.Generator().manual_seed(time)
    few, many = (torch.rand(2, time, generator=generator) < torch.tensor([[0.02], [0.3]])).cumsum(1)
    padded = few.clone()
    padded[-time // 3 :] = time
    return torch.stack([torch.zeros(time), torch.arange(time), few, many, padded]).int()


def draw(
    time: int, heads: int, dtype: torch.dtype, *, batch: int = 5, size: int = 16
) -> tuple[Inputs, Tensor]:
    """Return queries, keys and values as projections make them, and the gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, time, n, size) for n in (4, heads, heads, 4)]
    q, k, v, grad = (torch.randn(s, generator=generator).to(dtype).transpose(1, 2) for s in shapes)
    return (q, k, v), grad


def by_hand(q: Tensor, k: Tensor, v: Tensor, documents: Tensor, scale: float) -> Tensor:
    """Attention written out, in the dtype of its inputs."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    same = packed.segments(documents)[:, :, None] == packed.segments(documents)[:, None, :]
    scores = (q @ k.mT * scale).masked_fill(~same.tril()[:, None], -torch.inf)
    return scores.softmax(-1) @ v


def results(function, inputs: Inputs, grad: Tensor, *rest: object) -> list[Tensor]:
    """Output and gradients."""
    inputs = tuple(x.detach().requires_grad_() for x in inputs)
    output = function(*inputs, *rest)
    return [output.detach(), *torch.autograd.grad(output, inputs, grad)]


@pytest.fixture
def flex_on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """FlexAttention holds all scores here, and refuses gradients, which its own operator has."""
    torch._dynamo.reset()
    compiled = torch.compile(torch_flex.flex_attention, fullgraph=True, backend="eager")
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *_: None)
    monkeypatch.setattr(flex_attention, "kernel", lambda: compiled)
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("kernel", "dtype", "time"),
    [
        *product(["document"], [torch.float64, torch.float32], [1, 3, 128, 300]),
        *product(["flex"], [torch.float64], [1, 129, 300]),
    ],
)
def test_every_kernel_is_attention_within_documents(
    kernel: str, dtype: torch.dtype, time: int, flex_on_cpu: None
) -> None:
    documents = layouts(time)
    for heads in (4, 2, 1):
        inputs, grad = draw(time, heads, torch.float64)
        expected = results(by_hand, inputs, grad, documents, 0.3)
        inputs, grad = tuple(x.to(dtype) for x in inputs), grad.to(dtype)
        found = results(attention.attend, inputs, grad, mask_for(kernel, documents), 0.3)
        tolerance = 1e-12 if dtype == torch.float64 else 2e-5
        for x, y in zip(found, expected, strict=True):
            torch.testing.assert_close(x.double(), y, rtol=tolerance, atol=tolerance)


def test_channels_far_apart_in_memory_are_read_right() -> None:
    documents = layouts(40)
    inputs, grad = draw(40, 2, torch.float64)
    expected = results(by_hand, inputs, grad, documents, 0.25)
    apart = tuple(x.mT.contiguous().mT for x in (*inputs, grad))
    found = results(attention.attend, apart[:3], apart[3], mask_for("document", documents))
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("longest_in_float32", [0, 256])
def test_bfloat16_is_near(longest_in_float32: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(document_attention, "FLOAT32_LENGTH", longest_in_float32)
    documents = layouts(300)
    inputs, grad = draw(300, 2, torch.bfloat16)
    exact = tuple(x.double() for x in inputs)
    expected = results(by_hand, exact, grad.double(), documents, 0.25)
    found = results(attention.attend, inputs, grad, mask_for("document", documents))
    for x, y in zip(found, expected, strict=True):
        assert x.dtype == torch.bfloat16
        assert (x - y).norm() < 0.01 * y.norm()


def test_blocks_are_those_that_a_look_at_every_pair_finds() -> None:
    for time in (1, 127, 128, 129, 512, 900):
        begins = packed.begins(layouts(time))

        def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor, begins: Tensor = begins) -> Tensor:
            return (begins[b, q] <= k) & (k <= q)

        found = flex_attention.block_mask(begins)
        expected = torch_flex.create_block_mask(sees, len(begins), None, time, time, device="cpu")
        assert found.shape == expected.shape
        for kind in ("kv", "full_kv", "q", "full_q"):
            counts = getattr(expected, f"{kind}_num_blocks")
            assert torch.equal(getattr(found, f"{kind}_num_blocks"), counts)
            listed = [getattr(mask, f"{kind}_indices") for mask in (found, expected)]
            counted = torch.arange(listed[0].shape[-1]) < counts[..., None]
            assert torch.equal(*(indices[counted] for indices in listed))
            assert listed[0].dtype == torch.int32
            assert listed[0].min() >= 0
            assert listed[0].max() < listed[0].shape[-1]


def test_which_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_can_compile", lambda: True)
    assert attention.kernel("cpu", 256, 64) == attention.kernel("cuda", 256, 64) == "dense"
    assert attention.kernel("cpu", 257, 8) == "document"
    assert attention.kernel("cuda", 257, 16) == "flex"
    assert attention.kernel("cuda", 257, 8) == attention.kernel("mps", 257, 64) == "dense"
    monkeypatch.setattr(attention, "_can_compile", lambda: False)
    assert attention.kernel("cuda", 257, 64) == "dense"


def test_a_gpu_without_a_compiler_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steepest.compiler.problem", lambda: "No C++ compiler (g++) was found.")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    with pytest.warns(UserWarning, match=r"No C\+\+ compiler .* square of the row"):
        assert attention.kernel("cuda", 512, 64) == "dense"
    monkeypatch.setattr("steepest.compiler.problem", lambda: "")
    assert attention.kernel("cuda", 512, 64) == "flex"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.warns(UserWarning, match="Triton is not installed"):
        assert attention.kernel("cuda", 512, 64) == "dense"


@pytest.mark.parametrize("kernel", ["document", "flex"])
@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(kv_heads=2, intermediate_size=48, **SMALL),
        GPT2Config(**SMALL),
        MoEConfig(intermediate_size=48, experts=4, **SMALL),
    ],
    ids=lambda config: config.architecture,
)
def test_a_model_learns_the_same_by_every_kernel(
    config: ModelConfig, kernel: str, flex_on_cpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(config).train()
    found = [
        gradient(model, of, recompute, monkeypatch)
        for of, recompute in (("dense", False), (kernel, False), (kernel, True))
    ]
    for gradients in found[1:]:
        assert (gradients - found[0]).norm() < 1e-5 * found[0].norm()


def test_one_graph_serves_every_batch(flex_on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    function = torch.compile(torch_flex.flex_attention, fullgraph=True, backend=compiled)
    monkeypatch.setattr(flex_attention, "kernel", lambda: function)
    model = build(LlamaConfig(**SMALL)).train()
    for seed in range(3):
        gradient(model, "flex", False, monkeypatch, seed)
    assert compiled.frame_count == 1


def test_many_models_in_a_process_get_their_kernels(flex_on_cpu: None) -> None:
    documents = layouts(5)
    mask = mask_for("flex", documents)
    with torch._dynamo.config.patch(recompile_limit=1):
        for heads, size in ((4, 16), (2, 16), (4, 32)):
            inputs, grad = draw(5, heads, torch.float32, size=size)
            results(attention.attend, inputs, grad, mask)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kernel", ["document", "flex"])
def test_a_compiled_model_is_one_graph(
    kernel: str, recompute: bool, flex_on_cpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(LlamaConfig(kv_heads=2, **SMALL)).train()
    eager = gradient(model, kernel, recompute, monkeypatch)
    objective = torch.compile(model.objective, fullgraph=True, backend="aot_eager")
    monkeypatch.setattr(model, "objective", objective)
    compiled = gradient(model, kernel, recompute, monkeypatch)
    assert (compiled - eager).norm() < 1e-5 * eager.norm()


def test_the_host_reads_no_document_outside_the_operator() -> None:
    with FakeTensorMode():
        model = build(LlamaConfig(**SMALL))
        tokens = torch.zeros(2, 300, dtype=torch.int64)
        model.objective(tokens, tokens, tokens.int()).objective.backward()
        assert all(p.grad is not None for p in model.parameters())


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_does_not_grow_by_the_square_of_the_row() -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True
    )
    document, dense = map(float, done.stdout.split())
    assert document < 40
    assert dense > 300


MEMORY = """
import torch
from steepest.models import attention

torch.set_num_threads(1)
q, k, v = (torch.zeros(1, 1, 8192, 8, requires_grad=True) for _ in range(3))
documents = (torch.arange(8192) // 512).int()[None]

def most():  # not of getrusage, where a process begins with what its parent had
    status = open("/proc/self/status").read()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024

def grows():
    before = most()
    attention.attend(q, k, v, attention.document_mask(documents, 8)).sum().backward()
    return most() - before

print(grows())
attention.kernel = lambda *_: "dense"
print(grows())
"""
"""Prints the MiB that attention takes forward and backward: as it is, and by a mask."""


def mask_for(kernel: str, documents: Tensor) -> attention.Mask | None:
    """What a kernel wants to know of documents."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "kernel", lambda *_: kernel)
        return attention.document_mask(documents, 16)


def gradient(
    model: LanguageModel,
    kernel: str,
    recompute: bool,
    monkeypatch: pytest.MonkeyPatch,
    seed: int = 0,
) -> Tensor:
    """The model's gradient on some packed documents, with attention by one kernel."""
    monkeypatch.setattr(attention, "kernel", lambda *_: kernel)
    generator = torch.Generator().manual_seed(seed)
    tokens, targets = torch.randint(50, (2, 2, 150), generator=generator)
    documents = (torch.rand(2, 150, generator=generator) < 0.05).cumsum(1).int()
    model.recompute_activations = recompute
    model.zero_grad()
    model.objective(tokens, targets, documents).objective.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.02), (torch.float32, 1e-4)])
def test_a_gpu_computes_the_same(dtype: torch.dtype, tolerance: float) -> None:
    for time, heads, size in ((512, 4, 64), (900, 2, 64), (512, 1, 48), (512, 4, 128)):
        documents = layouts(time)
        inputs, grad = draw(time, heads, dtype, size=size)
        exact = tuple(x.double() for x in inputs)
        expected = results(by_hand, exact, grad.double(), documents, 0.1)
        inputs, grad = tuple(x.cuda() for x in inputs), grad.cuda()
        mask = attention.document_mask(documents.cuda(), size)
        assert isinstance(mask, torch_flex.BlockMask)
        found = results(attention.attend, inputs, grad, mask, 0.1)
        again = results(attention.attend, inputs, grad, mask, 0.1)
        for x, y, z in zip(found, expected, again, strict=True):
            assert torch.equal(x, z)
            assert (x.cpu() - y).norm() < tolerance * y.norm()


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("recompute", [False, True])
def test_a_step_on_packed_documents_does_not_wait_for_a_gpu(recompute: bool) -> None:
    model = build(LlamaConfig(kv_heads=2, **SMALL)).cuda().train()
    model.recompute_activations = recompute
    tokens = torch.randint(50, (3, 2, 512)).cuda()
    batches = [layouts(512)[place : place + 2].cuda() for place in range(3)]
    for number, documents in enumerate(batches):
        torch.cuda.set_sync_debug_mode("error" if number else "default")
        try:
            with torch.autocast("cuda", torch.bfloat16):
                loss = model.objective(tokens[number], tokens[number], documents)
            loss.objective.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@on_gpu
def test_a_long_row_on_a_gpu_takes_little_memory() -> None:
    time = 32_768
    inputs, grad = draw(time, 4, torch.bfloat16, batch=1, size=64)
    inputs, grad = tuple(x.cuda() for x in inputs), grad.cuda()
    documents = (torch.arange(time) // 700).int()[None].cuda()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results(attention.attend, inputs, grad, attention.document_mask(documents, 64))
    assert torch.cuda.max_memory_allocated() - held < 256 * 2**20  # the mask alone took 1024
