"""The gradient of a step: of which loss, over which tokens, of which rounding."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from steepest import data
from steepest.models import GPT2Config, LlamaConfig, MoEConfig
from steepest.models.cross_entropy import IGNORED
from steepest.train.learner import Learner
from steepest.train.parallel import Parallel
from steepest.train.precision import autocast

from .conftest import MakeConfig

CPU = torch.device("cpu")


def test_accumulation_is_the_large_batch(make_config: MakeConfig) -> None:
    whole, parts = (
        Learner(make_config(gradient_accumulation=parts, clip_norm=0.0), CPU) for parts in (1, 4)
    )
    torch.manual_seed(0)
    batch = data.Batch(*torch.randint(300, (2, 4, 16)))
    results = [learner.gradient(batch) for learner in (whole, parts)]
    for left, right in zip(whole.parameters, parts.parameters, strict=True):
        assert left.grad is not None
        assert right.grad is not None
        torch.testing.assert_close(left.grad, right.grad, rtol=1e-5, atol=1e-7)
    for name in ("loss", "norm"):
        left, right = (getattr(result, name) for result in results)
        torch.testing.assert_close(left, right, rtol=1e-5, atol=0)


SHAPE = {"vocab_size": 300, "hidden_size": 16, "layers": 2, "heads": 2}
MODELS = {
    "llama": LlamaConfig(**SHAPE, intermediate_size=32, tie_embeddings=True),
    "gpt2": GPT2Config(**SHAPE, max_sequence_length=16),
    "moe": MoEConfig(
        **SHAPE, intermediate_size=32, experts=4, balance_loss=0.5, router_z_loss=0.3,
        entropy_loss=0.1,
    ),
}  # fmt: skip


def uneven(rows: int) -> data.Batch:
    """Return rows of which each has other targets, and one has none, in documents of 5 tokens."""
    tokens = torch.randint(300, (rows, 17), generator=torch.Generator().manual_seed(0))
    targets = tokens[:, 1:].clone()
    for row in range(rows):
        targets[row, 5 * row % 16 :] = IGNORED
    documents = (torch.arange(16) // 5).int().repeat(rows, 1)
    return data.Batch(tokens[:, :-1].contiguous(), targets, documents)


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("name", MODELS)
def test_the_gradient_is_that_of_the_mean_over_targets(
    name: str, parts: int, make_config: MakeConfig
) -> None:
    """Torch's cross-entropy of whole logits, PaLM's z-loss, and auxiliary losses by targets."""
    batch = uneven(8)
    config = make_config(
        batch_size=8, gradient_accumulation=parts, z_loss=0.01, clip_norm=0.0, packing="documents"
    )
    learner = Learner(dataclasses.replace(config, model=MODELS[name]), CPU)
    found = learner.gradient(batch)
    gradients = [p.grad for p in learner.parameters]
    learner.model.zero_grad()
    targets = (batch.targets != IGNORED).sum()
    whole = torch.zeros(())
    for part in learner.parts(batch):
        features = learner.model.features(part.tokens, part.documents)
        counts = part.targets != IGNORED
        logits = features.hidden @ learner.model.lm_head.weight.T
        labels = part.targets.flatten()
        nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels, reduction="sum")
        square = (logits.logsumexp(-1).square() * counts).sum()
        auxiliary = 0.0 if features.auxiliary is None else features.auxiliary * counts.sum()
        whole = whole + (nats + 0.01 * square + auxiliary) / targets
    whole.backward()  # type: ignore[no-untyped-call]
    for p, gradient in zip(learner.parameters, gradients, strict=True):
        torch.testing.assert_close(gradient, p.grad, rtol=1e-4, atol=1e-7)
    norms = torch.stack([p.grad.norm() for p in learner.parameters if p.grad is not None])
    torch.testing.assert_close(found.norm, norms.norm(), rtol=1e-5, atol=0)


def test_products_kept_in_float32_are_not_rounded_on_the_way_back(make_config: MakeConfig) -> None:
    config = make_config(batch_size=8, precision="bfloat16", clip_norm=0.0)
    learner = Learner(dataclasses.replace(config, model=MODELS["moe"]), CPU)
    batch = uneven(8)
    learner.gradient(batch)
    found = [p.grad for p in learner.parameters]
    learner.model.zero_grad()
    with autocast("bfloat16", CPU):
        loss = learner.model.objective(batch.tokens, batch.targets, batch.documents)
    loss.objective.backward()  # type: ignore[no-untyped-call]
    for p, gradient in zip(learner.parameters, found, strict=True):
        assert torch.equal(gradient, p.grad)  # type: ignore[arg-type]


def test_a_model_s_statistics_are_those_of_all_processes(make_config: MakeConfig) -> None:
    class Two(Parallel):
        def mean(self, value: torch.Tensor) -> torch.Tensor:
            return value + (1.0 if value.ndim else 0.0)  # as if the other one had 2 more

    config = dataclasses.replace(make_config(batch_size=8), model=MODELS["moe"])
    alone, shared = (
        Learner(config, CPU, parallel).gradient(uneven(8)) for parallel in (Parallel(), Two())
    )
    assert alone.statistics.keys() == shared.statistics.keys()
    for name, value in alone.statistics.items():
        assert shared.statistics[name] == value + 1, name
    assert shared.loss == alone.loss + 1


def test_an_estimate_of_curvature_counts_the_tokens_with_a_loss(make_config: MakeConfig) -> None:
    options = {"betas": [0.9, 0.5], "update_interval": 1}
    config = make_config(
        name="sophia_g", batch_size=8, gradient_accumulation=2, options=options, packing="documents"
    )
    learner, batch = Learner(config, CPU), uneven(8)
    sampled = learner._with_sampled_labels(batch)
    assert torch.equal(sampled.targets == IGNORED, batch.targets == IGNORED)
    learner.model.objective(sampled.tokens, sampled.targets, sampled.documents).objective.backward()  # type: ignore[no-untyped-call]
    count = int((batch.targets != IGNORED).sum())
    wanted = [0.5 * count * p.grad**2 for p in learner.parameters if p.grad is not None]
    learner._observe(batch)
    for p, hessian in zip(learner.parameters, wanted, strict=True):
        torch.testing.assert_close(
            learner.optimizer.state[p]["hessian"], hessian, rtol=1e-4, atol=1e-12
        )


def test_sampled_labels_are_torch_s(make_config: MakeConfig) -> None:
    learner = Learner(make_config(name="sophia_g", seed=3), CPU)
    batch = data.Batch(*torch.randint(300, (2, 4, 16), generator=torch.Generator().manual_seed(0)))
    odds = learner.model(batch.tokens).softmax(-1)
    for row, labels in enumerate(learner._with_sampled_labels(batch).targets):
        generator = torch.Generator().manual_seed(0x5EED + (3 << 32) + row)
        assert torch.equal(labels, torch.multinomial(odds[row], 1, generator=generator)[:, 0])


def test_clipping_scales_the_gradient_and_reports_its_norm_before(make_config: MakeConfig) -> None:
    batch = data.Batch(*torch.arange(128).reshape(2, 4, 16))
    free = Learner(make_config(clip_norm=0.0), CPU)
    norm = free.gradient(batch).norm
    clipped = Learner(make_config(clip_norm=float(norm) / 10), CPU)
    assert norm == clipped.gradient(batch).norm
    for left, right in zip(free.parameters, clipped.parameters, strict=True):
        assert left.grad is not None
        assert right.grad is not None
        torch.testing.assert_close(left.grad / 10, right.grad, rtol=1e-4, atol=1e-8)
