"""The published table of model and state memory, cell by cell, and counts by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from steepest import analysis, models
from steepest.optim.memory import held
from steepest.optim.roles import Role

SIZES = ("llama-60m", "llama-130m", "llama-350m", "llama-1b")
RANKS = {"llama-60m": 128, "llama-130m": 256, "llama-350m": 384, "llama-1b": 512}
EVERYWHERE = {"embed_tokens.weight": "hidden", "lm_head.weight": "hidden"}
PUBLISHED = {
    "adam": (0.35, 0.81, 2.21, 8.04),
    "stable_spam": (0.35, 0.81, 2.21, 8.04),
    "muon": (0.23, 0.54, 1.47, 5.36),
    "galore_adamw": (0.28, 0.61, 1.59, 4.76),
    "fira": (0.28, 0.61, 1.59, 4.76),
    "swan": (0.25, 0.46, 1.00, 3.20),
    "apollo": (0.28, 0.61, 1.59, 4.76),
    "apollo_mini": (0.25, 0.46, 1.00, 3.20),
    "scale": (0.15, 0.32, 0.80, 2.81),
}
"""GB (1e9 bytes) of weights and state in bfloat16: Glentis et al., 2025, arXiv:2506.16659, README
of OptimAI-Lab/Minimalist_LLM_Pretraining."""


def model_and_state(optimizer: str, size: str, **options: Any) -> analysis.Memory:
    with torch.device("meta"):
        model = models.Llama(models.size(size))
    rows = held(optimizer, model, dtype=torch.bfloat16, state_dtype=torch.bfloat16, **options)
    return analysis.memory(rows)


def projector_gb(size: str, rank: int) -> float:
    """Return the bytes of stored projections: the table counts APOLLO's, which we draw anew."""
    config = models.size(size)
    return 2e-9 * rank * 7 * config.hidden_size * config.layers


@pytest.mark.parametrize("index", range(4), ids=SIZES)
@pytest.mark.parametrize("optimizer", PUBLISHED)
def test_published_table(optimizer: str, index: int) -> None:
    size = SIZES[index]
    # Muon there keeps a momentum for every matrix, the embedding and the head among them.
    options: dict[str, Any] = {"roles": EVERYWHERE} if optimizer == "muon" else {}
    if optimizer in ("galore_adamw", "fira", "apollo"):
        options["rank"] = RANKS[size]
    found = model_and_state(optimizer, size, **options).model_and_state_gb
    if optimizer == "apollo":
        found += projector_gb(size, RANKS[size])
    assert found == pytest.approx(PUBLISHED[optimizer][index], abs=0.007)


@pytest.mark.parametrize(
    ("optimizer", "published", "options"),
    [
        ("apollo", 16.14, {"rank": 256}),
        ("apollo_mini", 14.53, {}),
        ("scale", 13.74, {}),
        ("muon", 26.95, {"roles": EVERYWHERE}),
    ],
)
def test_published_at_7b(optimizer: str, published: float, options: dict[str, Any]) -> None:
    found = model_and_state(optimizer, "llama-7b", **options).model_and_state_gb
    assert found == pytest.approx(published, abs=0.007)


def test_roles_by_hand() -> None:
    config = models.size("llama-60m")
    with torch.device("meta"):
        model = models.Llama(config)
    rows = {row.role: row for row in held("muon", model)}
    assert set(rows) == {role.value for role in Role}
    table = config.vocab_size * config.hidden_size
    assert rows["embedding"].parameters == rows["head"].parameters == table
    assert rows["head"].state_bytes == 8 * table
    assert rows["hidden"].state_bytes == 4 * rows["hidden"].parameters
    total = analysis.memory(rows.values())
    assert total.parameters == 58_073_600
    assert total.parameter_bytes == total.gradient_bytes == 4 * 58_073_600
    assert total.total_bytes == 8 * total.parameters + total.state_bytes
    assert total.state_bytes_per_parameter == total.state_bytes / 58_073_600
