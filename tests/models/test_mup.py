"""muP: the coordinate check, and what it changes."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from steepest.models import GPT2Config, LlamaConfig, MuPConfig, build, lr_multipliers

WIDTHS = (64, 128, 256, 512)
LLAMA = LlamaConfig(vocab_size=64, layers=2, init="normal")
GPT = GPT2Config(vocab_size=64, layers=2, tie_embeddings=False)


def resized(config: MuPConfig, width: int, base: int | None) -> MuPConfig:
    """Return a config of this width with heads of 16 channels."""
    changes = {"intermediate_size": 3 * width} if isinstance(config, LlamaConfig) else {}
    return dataclasses.replace(
        config, hidden_size=width, heads=width // 16, mup_base_width=base, **changes
    )


def sizes_after_training(config: MuPConfig, steps: int = 4) -> dict[str, float]:
    """Return the mean absolute changes of activations after some steps of Adam."""
    torch.manual_seed(0)
    model = build(config, torch.Generator().manual_seed(0))
    tokens = torch.randint(64, (8, 33), generator=torch.Generator().manual_seed(1))
    inputs, targets = tokens[:, :-1], tokens[:, 1:]

    def activations() -> dict[str, torch.Tensor]:
        with torch.no_grad():
            hidden = model.embed_tokens(inputs)
            return {"features": model.features(inputs).hidden, "logits": model(inputs), "x": hidden}

    start = activations()
    factor = lr_multipliers(config).get("hidden", 1.0)
    hidden = [p for n, p in model.named_parameters() if p.ndim > 1 and n.startswith("layers")]
    rest = [p for p in model.parameters() if all(p is not h for h in hidden)]
    lr = 0.01
    optimizer = torch.optim.Adam(
        [{"params": hidden, "lr": lr * factor}, {"params": rest, "lr": lr}], lr=lr
    )
    for _ in range(steps):
        optimizer.zero_grad()
        model.loss(inputs, targets).backward()
        optimizer.step()
    end = activations()
    return {name: (end[name] - start[name]).abs().mean().item() for name in start}


def slopes(config: MuPConfig, base: int | None) -> dict[str, float]:
    """Return by how many powers of the width each activation's change grows."""
    found = [sizes_after_training(resized(config, width, base)) for width in WIDTHS]
    x = torch.tensor([math.log(width) for width in WIDTHS])
    x = x - x.mean()
    return {
        name: float((x * torch.tensor([math.log(f[name]) for f in found])).sum() / x.square().sum())
        for name in found[0]
    }


@pytest.mark.slow
@pytest.mark.parametrize("config", [LLAMA, GPT], ids=lambda c: c.architecture)
def test_activations_change_alike_at_every_width(config: MuPConfig) -> None:
    with_mup, without = slopes(config, WIDTHS[0]), slopes(config, None)
    assert abs(with_mup["logits"]) < 0.2, with_mup
    assert abs(with_mup["features"]) < 0.2, with_mup
    assert without["logits"] > 0.4, without


def test_at_the_base_width_the_weights_are_the_standard_ones() -> None:
    plain, mup = build(LLAMA), build(dataclasses.replace(LLAMA, mup_base_width=LLAMA.hidden_size))
    for a, b in zip(plain.parameters(), mup.parameters(), strict=True):
        assert torch.equal(a, b)
    assert lr_multipliers(plain.config) == {}


def test_deviations_and_learning_rates_follow_the_table() -> None:
    config = resized(LLAMA, 256, 64)
    model = build(config)
    layer = model.layers[0]
    for matrix in (layer.attention.q_proj, layer.attention.o_proj, layer.mlp.down_proj):
        assert matrix.weight.std().item() == pytest.approx(0.02 / 2, rel=0.05)
    for table in (model.embed_tokens, model.lm_head):
        assert table.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert lr_multipliers(config) == {"hidden": 0.25}


@pytest.mark.parametrize("config", [LLAMA, GPT], ids=lambda c: c.architecture)
def test_logits_and_loss_use_the_same_output_multiplier(config: MuPConfig) -> None:
    model = build(
        dataclasses.replace(config, mup_base_width=16, embedding_scale=10.0, depth_scale=1.4)
    )
    tokens = torch.randint(64, (2, 21), generator=torch.Generator().manual_seed(1))
    hidden = model.features(tokens[:, :-1]).hidden
    logits = model(tokens[:, :-1])
    torch.testing.assert_close(logits, hidden @ model.lm_head.weight.T / 4)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    assert model.loss(tokens[:, :-1], tokens[:, 1:]).item() == pytest.approx(expected.item())


def test_depth_and_embedding_scales_reach_the_residual_stream() -> None:
    config = dataclasses.replace(LLAMA, layers=1, embedding_scale=10.0, depth_scale=1.4)
    plain = dataclasses.replace(config, embedding_scale=1.0, depth_scale=None)
    scaled, reference = build(config), build(plain)
    with torch.no_grad():  # the same function with the factors folded into the weights
        reference.embed_tokens.weight.mul_(10)
        for layer in reference.layers:
            layer.attention.o_proj.weight.mul_(1.4)
            layer.mlp.down_proj.weight.mul_(1.4)
    tokens = torch.arange(30)[None]
    torch.testing.assert_close(scaled(tokens), reference(tokens))
