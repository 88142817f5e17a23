"""The model against a float64 reference written here, and its properties."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from steepest.errors import UserError
from steepest.models import Llama, LlamaConfig
from steepest.models.rotary import turn

SMALL = LlamaConfig(
    vocab_size=37, hidden_size=24, layers=2, heads=4, intermediate_size=20, max_sequence_length=64
)
GROUPED = dataclasses.replace(SMALL, hidden_size=32, kv_heads=2)


def build(config: LlamaConfig, seed: int = 0) -> Llama:
    """A model whose gains are not all one, so that a forgotten gain shows."""
    model = Llama(config, torch.Generator().manual_seed(seed))
    noise = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=noise) * 0.3)
            else:
                parameter.mul_(10)  # away from the near-linear regime of small weights
    return model


def draw(config: LlamaConfig, batch: int, time: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (batch, time), generator=generator)


def reference_logits(model: Llama, tokens: np.ndarray) -> np.ndarray:
    """Logits of one sequence in float64, one head and one position at a time."""
    config = model.config
    w = {name: value.detach().double().numpy() for name, value in model.named_parameters()}
    w.setdefault("lm_head.weight", w["embed_tokens.weight"])

    def norm(x: np.ndarray, gain: np.ndarray) -> np.ndarray:
        return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + config.norm_eps) * gain

    def rotate(vector: np.ndarray, position: int) -> np.ndarray:
        half = len(vector) // 2
        pairs = vector[:half] + 1j * vector[half:]
        angles = position * config.rope_theta ** (-2 * np.arange(half) / len(vector))
        turned = pairs * np.exp(1j * angles)
        return np.concatenate([turned.real, turned.imag])

    x = w["embed_tokens.weight"][tokens]
    size, group = config.head_size, config.heads // config.key_value_heads
    for index in range(config.layers):
        layer = {
            name.removeprefix(f"layers.{index}."): value
            for name, value in w.items()
            if name.startswith(f"layers.{index}.")
        }
        y = norm(x, layer["attention_norm.weight"])
        q, k, v = (y @ layer[f"attention.{name}_proj.weight"].T for name in "qkv")
        mixed = np.zeros_like(q)
        for head in range(config.heads):
            own = slice(head * size, (head + 1) * size)
            shared = slice(head // group * size, (head // group + 1) * size)
            for now in range(len(tokens)):
                query = rotate(q[now, own], now)
                scores = np.array(
                    [query @ rotate(k[past, shared], past) for past in range(now + 1)]
                ) / np.sqrt(size)
                weights = np.exp(scores - scores.max())
                mixed[now, own] = weights / weights.sum() @ v[: now + 1, shared]
        x = x + mixed @ layer["attention.o_proj.weight"].T
        y = norm(x, layer["mlp_norm.weight"])
        gate = y @ layer["mlp.gate_proj.weight"].T
        up = y @ layer["mlp.up_proj.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * up) @ layer["mlp.down_proj.weight"].T
    return norm(x, w["norm.weight"]) @ w["lm_head.weight"].T


@pytest.mark.parametrize(
    "config", [SMALL, GROUPED, dataclasses.replace(SMALL, tie_embeddings=True)]
)
def test_logits_and_loss_agree_with_a_float64_reference(config: LlamaConfig) -> None:
    model = build(config)
    tokens = draw(config, 2, 13)
    expected = np.stack([reference_logits(model, row.numpy()) for row in tokens])
    logits = model(tokens)
    np.testing.assert_allclose(logits.detach().numpy(), expected, rtol=1e-4, atol=1e-4)

    targets = draw(config, 2, 13, seed=1)
    maximum = expected.max(-1, keepdims=True)
    log_sum = np.log(np.exp(expected - maximum).sum(-1)) + maximum[..., 0]
    chosen = np.take_along_axis(expected, targets.numpy()[..., None], -1)[..., 0]
    loss = model.loss(tokens, targets)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx((log_sum - chosen).mean(), rel=1e-5)


def test_loss_in_chunks_has_the_gradient_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(SMALL)
    tokens, targets = draw(SMALL, 4, 11), draw(SMALL, 4, 11, seed=1)
    torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), targets.flatten()).backward()
    whole = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    monkeypatch.setattr("steepest.models.cross_entropy.CHUNK_TOKENS", {"cpu": 7})  # 44 = 6 * 7 + 2
    model.loss(tokens, targets).backward()
    for parameter, expected in zip(model.parameters(), whole, strict=True):
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-6)


def test_a_token_never_changes_earlier_logits() -> None:
    model = build(GROUPED)
    tokens = draw(GROUPED, 1, 16)
    before = model(tokens)
    for time in (1, 7, 15):
        changed = tokens.clone()
        changed[0, time] = (changed[0, time] + 1) % GROUPED.vocab_size
        after = model(changed)
        torch.testing.assert_close(after[:, :time], before[:, :time], rtol=0, atol=1e-5)
        assert (after[0, time] - before[0, time]).abs().max() > 1e-2


def test_attention_sees_relative_positions_only() -> None:
    rotary = build(SMALL).rotary
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(SMALL.head_size, generator=generator) for _ in range(2))
    repeated_q, repeated_k = (turn(x.expand(1, 1, 40, -1), rotary(40))[0, 0] for x in (q, k))
    scores = repeated_q @ repeated_k.T
    for distance in (-5, 0, 11):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))
    assert (scores[0] - scores[0, 0]).abs().max() > 0.1


def test_tied_weights_share_storage_and_gradient() -> None:
    tied = build(dataclasses.replace(SMALL, tie_embeddings=True))
    assert tied.lm_head.weight is tied.embed_tokens.weight
    assert "lm_head.weight" not in dict(tied.named_parameters())

    free = build(SMALL)
    state = tied.state_dict()
    free.load_state_dict(state)
    tokens, targets = draw(SMALL, 2, 9), draw(SMALL, 2, 9, seed=1)
    for model in (tied, free):
        model.loss(tokens, targets).backward()
    both = free.embed_tokens.weight.grad + free.lm_head.weight.grad
    torch.testing.assert_close(tied.embed_tokens.weight.grad, both)


def test_grouped_queries_equal_repeated_keys_and_values() -> None:
    grouped = build(GROUPED)
    full = build(dataclasses.replace(GROUPED, kv_heads=None))
    state = grouped.state_dict()
    for name, value in state.items():
        if "k_proj" in name or "v_proj" in name:
            heads = value.unflatten(0, (GROUPED.key_value_heads, GROUPED.head_size))
            state[name] = heads.repeat_interleave(2, dim=0).flatten(0, 1)
    full.load_state_dict(state)
    tokens = draw(GROUPED, 2, 16)
    torch.testing.assert_close(grouped(tokens), full(tokens), rtol=1e-5, atol=1e-5)


def test_names_are_the_usual_ones_without_biases() -> None:
    names = set(dict(Llama(dataclasses.replace(SMALL, layers=1)).named_parameters()))
    layer = [f"attention.{name}_proj" for name in "qkvo"] + ["attention_norm", "mlp_norm"]
    layer += [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    assert names == {f"layers.0.{name}.weight" for name in layer} | {
        "embed_tokens.weight",
        "norm.weight",
        "lm_head.weight",
    }


def test_initial_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = Llama(SMALL, torch.Generator().manual_seed(5)).state_dict()
    torch.manual_seed(2)
    model = Llama(SMALL)
    drawn_before = torch.get_rng_state()
    model.reset_parameters(torch.Generator().manual_seed(5))
    assert torch.equal(torch.get_rng_state(), drawn_before)
    for name, value in model.state_dict().items():
        assert torch.equal(value, first[name]), name
    other = Llama(SMALL, torch.Generator().manual_seed(6)).state_dict()
    assert not torch.equal(other["lm_head.weight"], first["lm_head.weight"])


def test_building_a_model_leaves_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    Llama(SMALL)
    assert torch.equal(torch.get_rng_state(), before)


def test_initial_deviations() -> None:
    config = LlamaConfig(hidden_size=128, layers=8, intermediate_size=256)
    for name, parameter in Llama(config).named_parameters():
        if parameter.ndim == 1:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
            continue
        residual = "o_proj" in name or "down_proj" in name
        expected = 0.02 / 4 if residual else 0.02  # sqrt(2 * 8) = 4
        assert parameter.std().item() == pytest.approx(expected, rel=0.05), name
        assert abs(parameter.mean().item()) < expected / 20, name


def test_the_first_loss_is_that_of_a_uniform_guess() -> None:
    config = LlamaConfig()
    loss = Llama(config).loss(draw(config, 4, 64), draw(config, 4, 64, seed=1))
    assert loss.item() == pytest.approx(np.log(config.vocab_size), abs=0.05)


def test_bfloat16_autocast_stays_near_float32() -> None:
    model = Llama(LlamaConfig())
    tokens, targets = draw(model.config, 2, 32), draw(model.config, 2, 32, seed=1)
    exact = model.loss(tokens, targets)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model.loss(tokens, targets)
        assert model(tokens).dtype == torch.bfloat16
    assert rough.dtype == torch.float32
    rough.backward()
    assert rough.item() == pytest.approx(exact.item(), abs=0.01)
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())


def test_long_sequences_take_the_other_attention_dtype() -> None:
    model = build(SMALL)
    tokens = draw(SMALL, 1, 48)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        short = model(tokens).float()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("steepest.models.document_attention.FLOAT32_LENGTH", 0)
            long = model(tokens).float()
    assert 0 < (short - long).abs().max() < 0.1 * short.abs().max()


def test_a_model_cast_to_bfloat16_keeps_exact_rotary_tables() -> None:
    model = Llama(SMALL)
    tables = model.rotary.cos.clone(), model.rotary.sin.clone()
    model.to(torch.bfloat16)
    assert torch.equal(model.rotary.cos, tables[0])
    assert torch.equal(model.rotary.sin, tables[1])
    loss = model.loss(draw(SMALL, 2, 16), draw(SMALL, 2, 16, seed=1))
    loss.backward()
    assert loss.dtype == torch.float32
    assert model.lm_head.weight.grad.dtype == torch.bfloat16


def test_a_model_built_on_meta_is_complete_after_to_empty_and_reset() -> None:
    with torch.device("meta"):
        model = Llama(SMALL)
    model = model.to_empty(device="cpu")
    model.reset_parameters(torch.Generator().manual_seed(3))
    expected = Llama(SMALL, torch.Generator().manual_seed(3))
    tokens = draw(SMALL, 2, 16)
    assert torch.equal(model(tokens), expected(tokens))


def test_a_sequence_beyond_the_maximum_is_refused() -> None:
    with pytest.raises(UserError, match=r"65 tokens.*max_sequence_length of 64"):
        Llama(SMALL)(draw(SMALL, 1, 65))
