"""Every architecture of softmax attention compiles in one graph, which equals the eager one."""

from __future__ import annotations

import pytest
import torch

from steepest.models import GPT2Config, LlamaConfig, ModelConfig, build

SMALL = {"vocab_size": 37, "layers": 1, "max_sequence_length": 64}
LLAMA = LlamaConfig(hidden_size=32, heads=4, kv_heads=2, intermediate_size=24, **SMALL)
GPT = GPT2Config(hidden_size=32, heads=4, bias=True, tie_embeddings=True, **SMALL)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "precision", "packed"),
    [
        (LLAMA, torch.float32, True),
        (GPT, torch.bfloat16, False),
    ],
    ids=["llama", "gpt2"],
)
def test_compiled_in_one_graph_equals_eager(
    config: ModelConfig, precision: torch.dtype, packed: bool
) -> None:
    model = build(config)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(10 if p.ndim > 1 else 1)
    rng = torch.Generator().manual_seed(0)
    tokens, targets = torch.randint(37, (2, 2, 16), generator=rng)
    documents = torch.arange(16).div(6, rounding_mode="floor").int().expand(2, -1)
    results = []
    for objective in (model.objective, torch.compile(model.objective, fullgraph=True)):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
            loss = objective(tokens, targets, documents if packed else None, z_loss=1e-3)
        loss.objective.backward()
        gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
        results.append((loss.objective.item(), gradients))
        model.zero_grad()
    tolerance = 1e-5 if precision == torch.float32 else 2e-2
    assert results[1][0] == pytest.approx(results[0][0], rel=tolerance)
    assert (results[1][1] - results[0][1]).norm() < tolerance * results[0][1].norm()
