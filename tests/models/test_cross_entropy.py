"""The chunked loss against the plain one: values, gradients, masks, memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from steepest.models import LlamaConfig, build, cross_entropy


def problem(tokens: int = 50, channels: int = 12, vocab: int = 31) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, channels, generator=rng, requires_grad=True)
    weight = torch.randn(vocab, channels, generator=rng, requires_grad=True)
    targets = torch.randint(vocab, (tokens,), generator=rng)
    targets[::7] = cross_entropy.IGNORED
    return hidden, weight, targets


def plain(
    hidden: Tensor, weight: Tensor, targets: Tensor, scale: float, z_loss: float
) -> tuple[Tensor, Tensor]:
    logits = scale * hidden @ weight.T
    nats = F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
    log_z = logits.logsumexp(-1)[targets != -100]
    return nats + z_loss * log_z.square().sum(), nats


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("tokens", [7, 50, 256])
def test_values_and_gradients_are_those_of_the_plain_loss(
    z_loss: float, scale: float, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK_TOKENS", {"cpu": tokens})
    hidden, weight, targets = problem()
    total, nats = cross_entropy.sums(hidden, weight, targets, scale=scale, z_loss=z_loss)
    expected, expected_nats = plain(hidden, weight, targets, scale, z_loss)
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(nats, expected_nats, rtol=1e-5, atol=0)
    assert not nats.requires_grad
    ours = torch.autograd.grad(3 * total, [hidden, weight])
    theirs = torch.autograd.grad(3 * expected, [hidden, weight])
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine - other).norm() <= 1e-5 * other.norm()


def test_float64_is_kept_and_the_gradient_is_the_slope() -> None:
    hidden, weight, targets = (
        x.detach().double().requires_grad_() if x.is_floating_point() else x for x in problem(9)
    )

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return cross_entropy.sums(hidden, weight, targets, scale=0.5, z_loss=0.01)[0]

    assert torch.autograd.gradcheck(loss, (hidden, weight))


def test_the_gradient_of_a_bfloat16_head_is_rounded_once() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(16_384, 64, generator=generator).bfloat16().requires_grad_()
    weight = (torch.randn(300, 64, generator=generator) / 10).bfloat16().requires_grad_()
    targets = torch.randint(300, (16_384,), generator=generator)
    total, _ = cross_entropy.sums(hidden, weight, targets)
    total.backward()
    exact = weight.detach().double().requires_grad_()
    logits = hidden.detach().double() @ exact.T
    F.cross_entropy(logits, targets, reduction="sum").backward()
    assert weight.grad is not None
    assert exact.grad is not None
    assert (weight.grad - exact.grad).norm() < 3e-3 * exact.grad.norm()  # 2e-3; 9e-3 by chunks


def test_a_frozen_head_or_no_gradient_at_all() -> None:
    hidden, weight, targets = problem()
    expected = plain(hidden, weight, targets, 1.0, 0.0)[0]
    with torch.no_grad():
        assert cross_entropy.sums(hidden, weight, targets)[0].item() == pytest.approx(
            expected.item(), rel=1e-6
        )
    total, _ = cross_entropy.sums(hidden, weight.detach(), targets)
    (gradient,) = torch.autograd.grad(total, [hidden])
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, [hidden])[0])


def test_all_logits_never_exist_at_once() -> None:
    vocab, tokens = 4096, 8 * 256
    hidden = torch.randn(tokens, 8, requires_grad=True)
    weight = torch.randn(vocab, 8, requires_grad=True)
    targets = torch.zeros(tokens, dtype=torch.int64)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(x, Tensor):
                    largest = max(largest, x.numel())
            return out

    with Watch():
        cross_entropy.sums(hidden, weight, targets)[0].backward()
    assert largest == 256 * vocab


def test_parts_of_a_batch_add_up_to_its_mean_over_tokens() -> None:
    model = build(LlamaConfig(vocab_size=50, hidden_size=16, layers=1, heads=2))
    rng = torch.Generator().manual_seed(0)
    tokens, targets = (torch.randint(50, (4, 12), generator=rng) for _ in range(2))
    targets[0, 3:] = -100  # the parts have different numbers of targets
    whole = model.objective(tokens, targets, z_loss=1e-3)
    whole.objective.backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    count = (targets != -100).sum()
    parts = [
        model.objective(tokens[i : i + 2], targets[i : i + 2], tokens_in_batch=count, z_loss=1e-3)
        for i in (0, 2)
    ]
    for part in parts:
        part.objective.backward()
    assert sum(p.objective for p in parts).item() == pytest.approx(whole.objective.item(), rel=1e-6)
    assert sum(p.cross_entropy for p in parts).item() == pytest.approx(
        model.loss(tokens, targets).item(), rel=1e-6
    )
    for p, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-4, atol=1e-7)
