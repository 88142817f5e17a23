"""GLA, DeltaNet and Gated DeltaNet against a float64 reference, and their properties."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch

from steepest.errors import UserError
from steepest.models import (
    DeltaNetConfig,
    GatedDeltaNetConfig,
    GLAConfig,
    build,
    parameter_count,
    size,
)
from steepest.models.language_model import LanguageModel

CONFIGS = {
    config.architecture: config
    for config in (
        GLAConfig(vocab_size=37, hidden_size=24, heads=3, intermediate_size=20, gate_rank=5),
        DeltaNetConfig(vocab_size=37, hidden_size=24, heads=3, intermediate_size=20, expand_k=0.5),
        GatedDeltaNetConfig(vocab_size=37, hidden_size=24, head_size=6, intermediate_size=20),
    )
}
# Facts of scaling-for-scaling's Stage 2: parameters in all, beside the embeddings, in matrices, in
# vectors and in convolutions.
PUBLISHED = {
    "transformer++-340m": (373_867_520, 308_331_520, 308_281_344, 50_176, 0),
    "transformer++-1b": (1_364_297_728, 1_233_225_728, 1_233_125_376, 100_352, 0),
    "gla-340m": (374_475_776, 308_939_776, 308_871_168, 68_608, 0),
    "gla-1b": (1_365_514_240, 1_234_442_240, 1_234_305_024, 137_216, 0),
    "deltanet-340m": (374_362_112, 308_826_112, 308_477_952, 53_248, 294_912),
    "deltanet-1b": (1_365_677_056, 1_234_605_056, 1_233_911_808, 103_424, 589_824),
    "gated-deltanet-340m": (512_272_124, 446_736_124, 446_164_992, 55_036, 516_096),
    "gated-deltanet-1b": (1_387_348_732, 1_256_276_732, 1_255_661_568, 99_068, 516_096),
}
each_architecture = pytest.mark.parametrize("name", CONFIGS)


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_have_the_published_parameters(name: str) -> None:
    config = size(name)
    with torch.device("meta"):
        parameters = dict(build(config).named_parameters())
    hidden = [x for key, x in parameters.items() if not key.startswith(("embed_", "lm_head"))]
    matrices, vectors, kernels = (
        sum(x.numel() for x in hidden if x.ndim == dimensions) for dimensions in (2, 1, 3)
    )
    count = parameter_count(config)
    found = (count.total, count.non_embedding, matrices, vectors, kernels)
    assert found == PUBLISHED[name]
    assert (config.norm_eps, config.init, config.init_std) == (1e-6, "normal", 0.02)
    if not name.startswith("transformer"):
        assert dataclasses.replace(config, intermediate_size=None).mlp_size == config.mlp_size


def strong(name: str) -> LanguageModel:
    """A model away from the near-linear regime of small weights, with gains that differ."""
    model = build(CONFIGS[name])
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=noise) * 0.3)
            else:
                parameter.mul_(10)
    return model


def draw(time: int, batch: int = 2, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(37, (batch, time), generator=generator)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def norm(x: np.ndarray, gain: np.ndarray) -> np.ndarray:
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-5) * gain


class Mixer:
    """One layer's recurrence in float64, token after token."""

    def __init__(self, config: Any, weights: dict[str, np.ndarray]) -> None:
        self.config, self.w = config, weights
        self.past: list[np.ndarray] = []
        self.state = np.zeros((config.heads, config.key_size, config.value_size))

    def project(self, name: str, x: np.ndarray) -> np.ndarray:
        """Heads of a projection of x, or of the last ones after a convolution."""
        y = self.w[f"{name}_proj.weight"] @ x
        if f"{name}_conv.weight" in self.w:
            kernel = self.w[f"{name}_conv.weight"][:, 0]
            window = [self.w[f"{name}_proj.weight"] @ past for past in self.past[-4:]]
            taps = kernel.T[-len(window) :]
            y = sum(tap * z for tap, z in zip(taps, window, strict=True))
            y = y * sigmoid(y)
        return y.reshape(self.config.heads, -1)

    def step(self, x: np.ndarray) -> np.ndarray:
        w = self.w
        self.past.append(x)
        q, k, v = (self.project(name, x) for name in "qkv")
        if self.config.architecture == "gla":
            low = w["decay_in_proj.weight"] @ x
            logits = w["decay_out_proj.weight"] @ low + w["decay_out_proj.bias"]
            decay = sigmoid(logits.reshape(k.shape)) ** (1 / 16)
            beta = None
        else:
            q, k = (y / np.sqrt((y**2).sum(-1, keepdims=True) + 1e-6) for y in (q, k))
            beta = sigmoid(w["b_proj.weight"] @ x)
            decay = np.ones((self.config.heads, 1))
        if self.config.architecture == "gated_deltanet":
            step = np.log1p(np.exp(w["a_proj.weight"] @ x + w["dt_bias"]))
            decay = np.exp(-np.exp(w["A_log"]) * step)[:, None]
        outputs = []
        for head in range(self.config.heads):
            state = decay[head][:, None] * self.state[head]
            write = v[head]
            if beta is not None:
                write = beta[head] * (v[head] - k[head] @ state)
            self.state[head] = state + np.outer(k[head], write)
            outputs.append(q[head] @ self.state[head] / np.sqrt(len(q[head])))
        y = norm(np.stack(outputs), w["o_norm.weight"])
        if "g_proj.weight" in w:
            gate = self.project("g", x)
            y = y * gate * sigmoid(gate)
        return w["o_proj.weight"] @ y.ravel()


def reference_logits(model: LanguageModel, tokens: np.ndarray) -> np.ndarray:
    """Logits of one sequence in float64."""
    w = {name: value.detach().double().numpy() for name, value in model.named_parameters()}
    x = w["embed_tokens.weight"][tokens]
    for index in range(model.config.layers):
        layer = {
            name.removeprefix(f"layers.{index}."): value
            for name, value in w.items()
            if name.startswith(f"layers.{index}.")
        }
        own = {name.removeprefix("attention."): value for name, value in layer.items()}
        mixer = Mixer(model.config, own)
        y = norm(x, layer["attention_norm.weight"])
        x = x + np.stack([mixer.step(row) for row in y])
        y = norm(x, layer["mlp_norm.weight"])
        gate = y @ layer["mlp.gate_proj.weight"].T
        up = y @ layer["mlp.up_proj.weight"].T
        x = x + (gate * sigmoid(gate) * up) @ layer["mlp.down_proj.weight"].T
    return norm(x, w["norm.weight"]) @ w["lm_head.weight"].T


@each_architecture
def test_logits_agree_with_a_float64_reference(name: str) -> None:
    model, tokens = strong(name), draw(70)
    expected = np.stack([reference_logits(model, row.numpy()) for row in tokens])
    np.testing.assert_allclose(model(tokens).detach().numpy(), expected, rtol=1e-4, atol=1e-4)


@each_architecture
def test_a_token_never_changes_earlier_logits(name: str) -> None:
    model, tokens = strong(name), draw(80, batch=1)
    before = model(tokens)
    for time in (1, 63, 79):
        changed = tokens.clone()
        changed[0, time] = (changed[0, time] + 1) % 37
        after = model(changed)
        torch.testing.assert_close(after[:, :time], before[:, :time], rtol=0, atol=1e-5)
        assert (after[0, time:] - before[0, time:]).abs().amax(-1).min() > 1e-4


@each_architecture
def test_packed_documents_are_as_if_alone(name: str) -> None:
    model, tokens = strong(name), draw(90, batch=1)
    lengths = (1, 2, 37, 30, 20)
    documents = torch.tensor([0, 1, 0, 1, 0], dtype=torch.int32).repeat_interleave(
        torch.tensor(lengths)
    )[None]
    together = model(tokens, documents)
    alone = torch.cat([model(part) for part in tokens.split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


@each_architecture
def test_every_parameter_learns(name: str) -> None:
    model = strong(name)
    model.loss(draw(20), draw(20, seed=1)).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad.abs().max() > 0, key


def test_names_are_the_usual_ones() -> None:
    names = {
        name.removeprefix("layers.0.attention.")
        for name, _ in build(CONFIGS["gated_deltanet"]).named_parameters()
        if name.startswith("layers.0.attention.")
    }
    projections = {f"{name}_proj.weight" for name in "qkvogab"}
    convolutions = {f"{name}_conv.weight" for name in "qkv"}
    assert names == projections | convolutions | {"A_log", "dt_bias", "o_norm.weight"}


@each_architecture
def test_the_first_loss_is_that_of_a_uniform_guess(name: str) -> None:
    config = dataclasses.replace(CONFIGS[name], init="normal")
    loss = build(config).loss(draw(64), draw(64, seed=1))
    assert loss.item() == pytest.approx(math.log(37), abs=0.05)


def test_decay_starts_as_in_mamba_2() -> None:
    model = build(GatedDeltaNetConfig(heads=500, head_size=1, layers=1, hidden_size=8))
    layer = model.layers[0].attention
    rates, steps = layer.A_log.exp(), torch.nn.functional.softplus(layer.dt_bias)
    assert 0 < rates.min() < 1
    assert 15 < rates.max() <= 16
    assert rates.mean().item() == pytest.approx(8, abs=0.7)
    assert 0.999e-3 < steps.min() < 2e-3
    assert 5e-2 < steps.max() < 1.001e-1
    assert steps.log10().mean().item() == pytest.approx(-2, abs=0.1)


@each_architecture
def test_initial_weights_depend_on_the_seed_alone(name: str) -> None:
    before = torch.get_rng_state()
    first = build(CONFIGS[name], torch.Generator().manual_seed(5))
    with torch.device("meta"):
        second = build(CONFIGS[name])
    second = second.to_empty(device="cpu")
    second.reset_parameters(torch.Generator().manual_seed(5))
    assert torch.equal(torch.get_rng_state(), before)
    for key, value in second.state_dict().items():
        assert torch.equal(value, first.state_dict()[key]), key


@each_architecture
def test_bfloat16_autocast_stays_near_float32(name: str) -> None:
    model = build(CONFIGS[name])
    tokens, targets = draw(100), draw(100, seed=1)
    exact = model.loss(tokens, targets)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model.loss(tokens, targets)
        assert model(tokens).dtype == torch.bfloat16
    assert rough.dtype == torch.float32
    rough.backward()
    assert rough.item() == pytest.approx(exact.item(), abs=0.01)
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())


@each_architecture
def test_a_model_cast_to_bfloat16_runs(name: str) -> None:
    model = build(CONFIGS[name]).to(torch.bfloat16)
    loss = model.loss(draw(40), draw(40, seed=1))
    loss.backward()
    assert loss.item() == pytest.approx(math.log(37), abs=0.1)
    assert model.lm_head.weight.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["gla", "gated_deltanet"])
def test_the_loss_of_packed_documents_is_one_graph(name: str) -> None:
    model = build(dataclasses.replace(CONFIGS[name], layers=1))
    tokens, targets = draw(70), draw(70, seed=1)
    documents = (torch.arange(70) // 23).to(torch.int32).expand(2, -1)
    # As inductor sees it, but without its code, which takes half a minute.
    traced = torch.compile(model.loss, fullgraph=True, dynamic=False, backend="aot_eager")
    gradients = []
    for loss_of in (model.loss, traced):
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(tokens, targets, documents)
        loss.backward()
        gradients.append(torch.cat([x.grad.flatten() for x in model.parameters()]))
        model.zero_grad()
    assert (gradients[1] - gradients[0]).norm() < 1e-2 * gradients[0].norm()


@pytest.mark.parametrize(
    ("config", "changes", "words"),
    [
        ("gla", {"expand_k": 0.3}, "hidden_size times expand_k must be a multiple of heads"),
        ("gla", {"heads": 5}, "must be a multiple of heads, not 12"),
        ("gla", {"gate_rank": 0}, "gate_rank must be a whole number"),
        ("gla", {"gate_logit_normalizer": 0.0}, "gate_logit_normalizer must be a positive number"),
        ("deltanet", {"conv_size": 0}, "conv_size must be a whole number"),
        ("deltanet", {"expand_v": -1.0}, "expand_v must be a positive number"),
        ("deltanet", {"intermediate_size": 0}, "intermediate_size must be a whole number"),
        ("gated_deltanet", {"expand_v": 1.1}, "head_size times expand_v must be a whole number"),
        ("gated_deltanet", {"head_size": 0}, "head_size must be a whole number"),
    ],
)
def test_impossible_values_are_refused(config: str, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        dataclasses.replace(CONFIGS[config], **changes)
