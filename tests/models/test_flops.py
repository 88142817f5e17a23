"""Operations per token against torch's own counter of those it does."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from steepest import models
from steepest.models import chunk_states, chunked
from steepest.models.flops import multiplied_weights, training_flops_per_token

LENGTH = 64


def counted(config: models.Config) -> float:
    """Return what torch counts for one step on 2 sequences, per token."""
    model = models.build(config)
    tokens = torch.randint(config.vocab_size, (2, LENGTH))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        logits = model(tokens)
        logits.sum().backward()
    return counter.get_total_flops() / tokens.numel()


@pytest.mark.parametrize("tie_embeddings", [True, False])
@pytest.mark.parametrize(
    "config",
    [
        models.LlamaConfig(hidden_size=32, heads=4, intermediate_size=48, layers=3, vocab_size=96),
        models.LlamaConfig(hidden_size=32, heads=4, kv_heads=2, layers=2, vocab_size=96),
        models.GPT2Config(hidden_size=32, heads=4, layers=2, vocab_size=96),
    ],
)
def test_transformers_cost_what_torch_counts(config: models.Config, tie_embeddings: bool) -> None:
    config = type(config)(**{**vars(config), "tie_embeddings": tie_embeddings})
    assert training_flops_per_token(config, LENGTH) == counted(config)


def test_only_the_experts_that_a_token_goes_through_cost() -> None:
    dense = models.LlamaConfig(hidden_size=32, heads=4, intermediate_size=48, vocab_size=96)
    shape = vars(dense) | {"architecture": "moe"}
    router = 2 * 32 * 7  # layers, hidden, routed experts
    expert = 2 * 3 * 32 * 48
    for wanted, settings in (
        (3, {"experts_per_token": 2, "shared_experts": 1}),
        (2.5, {"shared_experts": 1, "routing": "expert_choice", "capacity_factor": 1.5}),
    ):
        config = models.MoEConfig(**{**shape, "experts": 8, **settings})
        extra = router + (wanted - 1) * expert
        assert multiplied_weights(config) == multiplied_weights(dense) + extra
    assert multiplied_weights(dense) == 96 * 32 + 2 * (4 * 32 * 32 + 3 * 32 * 48)


@pytest.mark.parametrize("architecture", ["gla", "deltanet", "gated_deltanet"])
def test_linear_attention_costs_what_torch_counts(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The counter does not look into operators, nor at triangular systems.
    monkeypatch.setattr(chunked, "chunk_states", chunk_states.chunk_states._init_fn)
    kind, _ = models.ARCHITECTURES[architecture]
    config = kind(hidden_size=32, heads=2, layers=2, vocab_size=96)
    model = models.build(config)
    tokens = torch.randint(96, (2, LENGTH))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(tokens)
    forward = counter.get_total_flops() / tokens.numel()
    heads = config.layers * config.heads
    keys, values = config.key_size, config.value_size
    if architecture == "gla":  # computes half of the scores: those of the past
        forward += heads * 2 * chunked.CHUNK * keys * (1 - 63 / 128)
    else:  # computes what keys recall twice
        forward += heads * (chunked.CHUNK**2 - 2 * keys * values)
    assert training_flops_per_token(config, LENGTH) == pytest.approx(3 * forward, rel=1e-3)


def test_length_costs_attention_alone() -> None:
    llama = models.size("llama-60m")
    short, long = (training_flops_per_token(llama, length) for length in (256, 1024))
    assert long - short == 12 * llama.layers * llama.hidden_size * (1024 - 256)
    gla = models.GLAConfig()
    assert training_flops_per_token(gla, 256) == training_flops_per_token(gla, 1024)
