"""Experts against a loop over tokens and against Mixtral; routing against its definitions."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from steepest.errors import UserError
from steepest.models import MoEConfig, MoELlama, build, routing
from steepest.models.moe import MoE

SMALL = MoEConfig(
    vocab_size=53,
    hidden_size=24,
    layers=2,
    heads=2,
    intermediate_size=16,
    experts=5,
    experts_per_token=2,
    max_sequence_length=64,
)


def mixture(**changes: Any) -> tuple[MoE, Tensor]:
    """Return a mixture with weights of a size that matters, and an input."""
    moe = MoE(dataclasses.replace(SMALL, **changes))
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in moe.parameters():
            p.copy_(torch.randn(p.shape, generator=rng) * 0.4)
    return moe, torch.randn(2, 9, SMALL.hidden_size, generator=rng, requires_grad=True)


def expert(moe: MoE, index: int, x: Tensor) -> Tensor:
    e = moe.experts
    gate, up, down = (w[index].double() for w in (e.gate_proj, e.up_proj, e.down_proj))
    return down @ (torch.nn.functional.silu(gate @ x) * (up @ x))


@pytest.mark.parametrize("gates", ["topk_softmax", "softmax_topk"])
@pytest.mark.parametrize("shared", [0, 2])
def test_token_choice_is_a_loop_over_tokens(gates: str, shared: int) -> None:
    moe, x = mixture(gates=gates, shared_experts=shared)
    y, _ = moe(x)
    for row, out in zip(x.flatten(0, 1).double(), y.flatten(0, 1), strict=True):
        logits = moe.router.weight.double() @ row
        best = sorted(range(len(logits)), key=lambda i: -logits[i].item())[:2]
        pool = logits[best] if gates == "topk_softmax" else logits
        expected = sum((logits[i] - pool.logsumexp(0)).exp() * expert(moe, i, row) for i in best)
        if shared:
            expected = expected + moe.shared.double()(row)
            moe.shared.float()
        torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gates", ["topk_softmax", "softmax_topk"])
def test_expert_choice_is_a_loop_over_experts(gates: str) -> None:
    moe, x = mixture(routing="expert_choice", gates=gates, capacity_factor=2.0)
    y, _ = moe(x)
    rows = x.flatten(0, 1).double()
    odds = (rows @ moe.router.weight.double().T).softmax(-1)
    count = int(2.0 * len(rows) / 5)
    picks = [sorted(range(len(rows)), key=lambda t: -odds[t, e].item())[:count] for e in range(5)]
    expected = torch.zeros_like(rows)
    for e, tokens in enumerate(picks):
        for t in tokens:
            whole = sum(odds[t, other] for other in range(5) if t in picks[other])
            gate = odds[t, e] / whole if gates == "topk_softmax" else odds[t, e]
            expected[t] += gate * expert(moe, e, rows[t])
    torch.testing.assert_close(y.flatten(0, 1).double(), expected, rtol=1e-4, atol=1e-5)


def test_gradients_reach_the_router_and_the_experts_that_were_used() -> None:
    moe, x = mixture()
    moe(x)[0].square().sum().backward()
    assert moe.router.weight.grad.abs().sum() > 0
    chosen, _ = routing.by_tokens(x.flatten(0, 1) @ moe.router.weight.T, 2, "topk_softmax")
    used = set(chosen.flatten().tolist())
    for index in range(5):
        assert bool(moe.experts.up_proj.grad[index].any()) == (index in used)


def test_an_expert_without_tokens_is_no_error() -> None:
    moe, x = mixture()
    with torch.no_grad():
        moe.router.weight.zero_()
        moe.router.weight[:2] = 1.0
        x.abs_()
    y, numbers = moe(x)
    assert y.isfinite().all()
    assert dict(zip(routing.NUMBERS, numbers.tolist(), strict=True))["largest_load"] == 2.5


def test_numbers_where_all_is_even() -> None:
    logits = torch.zeros(40, 8)
    chosen = torch.stack([torch.arange(40) % 8, (torch.arange(40) + 1) % 8], dim=1)
    found = routing.numbers(logits, routing.load(chosen, 8)).tolist()
    expected = [2.0, math.log(8) ** 2, math.log(8), 1.0]  # Switch: experts * sum f P, here top 2
    assert found == pytest.approx(expected, rel=1e-6)


def test_the_objective_adds_the_auxiliary_losses_times_their_coefficients() -> None:
    config = dataclasses.replace(SMALL, balance_loss=0.1, router_z_loss=0.02, entropy_loss=0.003)
    model = build(config)
    tokens = torch.randint(53, (2, 17), generator=torch.Generator().manual_seed(0))
    loss = model.objective(tokens[:, :-1], tokens[:, 1:])
    told = loss.statistics
    expected = (
        loss.cross_entropy
        + 0.1 * told["balance"]
        + 0.02 * told["router_z"]
        - 0.003 * told["router_entropy"]
    )
    assert loss.objective.item() == pytest.approx(expected.item(), rel=1e-6)
    assert loss.cross_entropy.item() == pytest.approx(
        model.loss(tokens[:, :-1], tokens[:, 1:]).item(), rel=1e-6
    )


def test_bfloat16_autocast_routes_in_float32() -> None:
    model = build(SMALL)
    tokens = torch.randint(53, (2, 17), generator=torch.Generator().manual_seed(0))
    exact = model.objective(tokens[:, :-1], tokens[:, 1:])
    with torch.autocast("cpu", torch.bfloat16):
        rough = model.objective(tokens[:, :-1], tokens[:, 1:])
    rough.objective.backward()
    assert rough.objective.item() == pytest.approx(exact.objective.item(), rel=0.01)
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


def test_mixtral_of_hugging_face() -> None:
    transformers = pytest.importorskip("transformers")
    model = build(SMALL)
    assert isinstance(model, MoELlama)
    theirs = transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            vocab_size=53,
            hidden_size=24,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_local_experts=5,
            num_experts_per_tok=2,
            rms_norm_eps=SMALL.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": SMALL.rope_theta},
            max_position_embeddings=64,
            sliding_window=None,
            tie_word_embeddings=False,
        )
    )
    weights = {}
    for name, p in model.named_parameters():
        parts = name.split(".")
        if parts[0] == "layers":
            block = f"model.layers.{parts[1]}."
            rest = ".".join(parts[2:])
            rest = rest.replace("attention_norm", "input_layernorm")
            rest = rest.replace("mlp_norm", "post_attention_layernorm")
            rest = rest.replace("attention.", "self_attn.").replace("mlp.router", "mlp.gate")
            weights[block + rest] = p
        else:
            weights[name if parts[0] == "lm_head" else f"model.{name}"] = p
    for block in ("model.layers.0.mlp.experts.", "model.layers.1.mlp.experts."):
        gate, up = weights.pop(block + "gate_proj"), weights.pop(block + "up_proj")
        weights[block + "gate_up_proj"] = torch.cat((gate, up), dim=1)
    theirs.load_state_dict({key: value.detach() for key, value in weights.items()})
    tokens = torch.randint(53, (2, 17), generator=torch.Generator().manual_seed(0))
    ours, expected = model(tokens), theirs(input_ids=tokens).logits
    assert (ours - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.slow
@pytest.mark.parametrize("way", ["token_choice", "expert_choice"])
def test_compiled_in_one_graph_equals_eager(way: str) -> None:
    model = build(dataclasses.replace(SMALL, layers=1, routing=way, shared_experts=1))
    with torch.no_grad():  # no near ties, which rounding would decide
        model.layers[0].mlp.router.weight.mul_(50)
    tokens = torch.randint(53, (2, 17), generator=torch.Generator().manual_seed(0))
    results = []
    for objective in (model.objective, torch.compile(model.objective, fullgraph=True)):
        loss = objective(tokens[:, :-1], tokens[:, 1:])
        loss.objective.backward()
        results.append(
            (loss.objective.item(), torch.cat([p.grad.flatten() for p in model.parameters()]))
        )
        model.zero_grad()
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    assert (results[0][1] - results[1][1]).norm() <= 1e-5 * results[0][1].norm()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"experts": 2, "shared_experts": 1}, "at least shared_experts"),
        ({"experts_per_token": 0}, "experts_per_token must be a whole number"),
        ({"intermediate_size": 20}, "multiples of 8"),
        ({"routing": "soft"}, "one of token_choice, expert_choice"),
        ({"balance_loss": -0.1}, "balance_loss must not be negative"),
        ({"capacity_factor": 0.0}, "capacity_factor must be a positive number"),
    ],
)
def test_impossible_values_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        dataclasses.replace(SMALL, **changes)
