"""Recurrences in chunks against their definition step by step, and against other code."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from steepest.models import recurrences
from steepest.models.chunk_states import chunk_state_gradients, chunk_states
from steepest.models.recurrences import step_by_step

Inputs = dict[str, Tensor]
KINDS = {
    "gla": recurrences.gated_linear_attention,
    "deltanet": recurrences.delta_rule,
    "gated_deltanet": recurrences.delta_rule,
}


def draw(kind: str, time: int, strength: float = 1.0, batch: int = 2) -> Inputs:
    """Inputs in float64; decay is `strength` times what the models start with or learn."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(batch, time, 3, *shape, generator=generator, dtype=torch.float64)

    q, k = (F.normalize(normal(8), dim=-1) for _ in range(2))
    inputs = {"q": q, "k": k, "v": normal(12)}
    if kind == "gla":
        return {**inputs, "log_decay": strength * F.logsigmoid(2 * normal(8)) / 16}
    inputs["beta"] = normal().sigmoid()
    if kind == "gated_deltanet":
        inputs["log_decay"] = strength * F.logsigmoid(2 * normal())
    return inputs


def borders(time: int) -> Tensor:
    """Documents: several in a chunk of 64, one over several chunks, some of one token."""
    numbers = torch.ones(2, time, dtype=torch.int64)
    for row, places in enumerate(([1, 2, 40, 41, 63], [5, 128, 130])):
        for place in places:
            numbers[row, place:] += 1
    return numbers


def results(function: Callable[..., Tensor], inputs: Inputs, dtype: torch.dtype) -> list[Tensor]:
    """The output, and the gradients of a random projection of it; gates in float32 at least."""
    gates = torch.promote_types(dtype, torch.float32)
    leaves = {
        name: x.to(dtype if name in "qkv" else gates, copy=True).requires_grad_()
        for name, x in inputs.items()
    }
    output = function(**leaves)
    assert output.dtype == dtype
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    (output.double() * weights).sum().backward()
    return [output.double(), *(x.grad.double() for x in leaves.values())]


def largest_error(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference, relative to the largest element of its tensor."""
    return max(
        ((x - y).abs().max() / y.abs().max()).item() for x, y in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_chunks_give_the_value_and_gradient_of_the_definition(kind: str, packed: bool) -> None:
    inputs = draw(kind, 150)
    segments = borders(150) if packed else None
    expected = results(lambda **x: step_by_step(**x, segments=segments), inputs, torch.float64)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.05)):
        found = results(lambda **x: KINDS[kind](**x, segments=segments), inputs, dtype)
        assert largest_error(found, expected) < tolerance, dtype


@pytest.mark.parametrize("time", [1, 2, 63, 64, 65])
@pytest.mark.parametrize("kind", KINDS)
def test_any_length_will_do(kind: str, time: int) -> None:
    inputs = draw(kind, time)
    torch.testing.assert_close(KINDS[kind](**inputs), step_by_step(**inputs))


@pytest.mark.parametrize(("kind", "strength"), [("gla", 500.0), ("gated_deltanet", 50.0)])
def test_no_decay_is_too_strong(kind: str, strength: float) -> None:
    inputs = draw(kind, 130, strength)
    sums = inputs["log_decay"].unflatten(1, (-1, 65)).sum(2)
    assert sums.min() < -2000  # over a chunk; exp(89) overflows
    expected = results(step_by_step, inputs, torch.float64)
    # A running sum of -2000 is rounded by 1e-4, which is then the error of a decay.
    assert largest_error(results(KINDS[kind], inputs, torch.float32), expected) < 2e-4


def test_the_delta_rule_is_stable_where_keys_repeat() -> None:
    inputs = draw("deltanet", 200)
    inputs["k"] = inputs["k"][:, :1].expand_as(inputs["k"])
    inputs["beta"] = torch.ones_like(inputs["beta"])
    expected = results(step_by_step, inputs, torch.float64)
    assert largest_error(results(recurrences.delta_rule, inputs, torch.float32), expected) < 1e-5
    # Every key overwrites what the one before it wrote.
    scores = torch.einsum("bthk,bthk->bth", inputs["q"], inputs["k"]) * 8**-0.5
    torch.testing.assert_close(expected[0], scores[..., None] * inputs["v"])


@pytest.mark.parametrize("kind", KINDS)
def test_packed_documents_are_as_if_alone(kind: str) -> None:
    inputs, segments = draw(kind, 150), borders(150)
    together = KINDS[kind](**inputs, segments=segments)
    for row in range(2):
        for number in segments[row].unique():
            own = segments[row] == number
            alone = KINDS[kind](**{name: x[row, own][None] for name, x in inputs.items()})
            torch.testing.assert_close(together[row, own], alone[0])


class Dtypes(TorchDispatchMode):
    """Records the dtypes of all results."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch.dtype] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else [result]:
            if isinstance(x, Tensor):
                self.seen.add(x.dtype)
        return result


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_computed_in_float64(kind: str) -> None:
    inputs = {name: x.float().requires_grad_() for name, x in draw(kind, 70).items()}
    with Dtypes() as dtypes:
        KINDS[kind](**inputs, segments=borders(150)[:, :70]).sum().backward()
    assert torch.float32 in dtypes.seen
    assert torch.float64 not in dtypes.seen


def test_the_operators_keep_their_promises_to_autograd_and_the_compiler() -> None:
    generator = torch.Generator().manual_seed(0)
    k, u, w = (
        (torch.randn(1, 2, 3, 4, size, generator=generator) / 4).requires_grad_()
        for size in (5, 6, 5)
    )
    by_channel, by_head = torch.rand(1, 2, 3, 5), torch.rand(1, 2, 3, 1)
    torch.library.opcheck(chunk_states, (k, u, None, by_channel.requires_grad_()))
    torch.library.opcheck(chunk_states, (k, u, w, by_head.requires_grad_()))
    states = torch.randn(1, 2, 3, 5, 6)
    torch.library.opcheck(chunk_state_gradients, (states, k.detach(), w.detach(), by_head.detach()))


@pytest.mark.slow
def test_compiled_in_one_graph_equals_eager() -> None:
    inputs = {name: x.float() for name, x in draw("gated_deltanet", 150).items()}
    inputs["segments"] = borders(150)
    compiled = torch.compile(recurrences.delta_rule, fullgraph=True)
    torch.testing.assert_close(compiled(**inputs), recurrences.delta_rule(**inputs))


def test_the_definition_agrees_with_flash_linear_attention() -> None:
    gla = pytest.importorskip("fla.ops.gla.naive")
    delta = pytest.importorskip("fla.ops.delta_rule.naive")
    gated = pytest.importorskip("fla.ops.gated_delta_rule.naive")

    def delta_rule(**inputs: Tensor) -> Tensor:
        output, _ = delta.delta_rule_recurrence(*(x.transpose(1, 2) for x in inputs.values()))
        return output.transpose(1, 2)

    theirs = {
        "gla": lambda q, k, v, log_decay: gla.naive_recurrent_gla(q, k, v, log_decay)[0],
        "deltanet": delta_rule,
        "gated_deltanet": lambda q, k, v, beta, log_decay: gated.naive_recurrent_gated_delta_rule(
            q, k, v, beta, log_decay
        )[0],
    }
    for kind, function in theirs.items():
        inputs = draw(kind, 100)
        expected = results(function, inputs, torch.float32)
        for ours in (step_by_step, KINDS[kind]):
            assert largest_error(results(ours, inputs, torch.float32), expected) < 1e-5, kind
