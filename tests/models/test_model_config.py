"""Named sizes, their published totals, and the validation of a config."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from steepest.errors import UserError
from steepest.models import Llama, LlamaConfig, parameter_count, size, size_entries, sizes

# The configs of GaLore and of epfml/llm-optimizer-benchmark, counted by their own code.
PUBLISHED = {
    "llama-60m": 58_073_600,
    "llama-130m": 134_105_856,
    "llama-350m": 367_969_280,
    "llama-1b": 1_339_082_752,
    "llama-7b": 6_738_415_616,
    "epfl-124m": 123_587_328,
    "epfl-210m": 208_540_416,
    "epfl-720m": 719_636_480,
}
GROUPED = LlamaConfig(heads=4, kv_heads=2, tie_embeddings=True)


def test_every_size_has_a_source_and_only_known_keys() -> None:
    fields = {field.name for field in dataclasses.fields(LlamaConfig)}
    for name, entry in size_entries().items():
        assert entry["source"], name
        assert set(entry) <= fields | {"source", "note", "parameters"}, name


def test_totals_are_the_published_ones() -> None:
    assert set(PUBLISHED) | {"race"} == set(sizes())
    for name, total in PUBLISHED.items():
        assert parameter_count(size(name)).total == total == size_entries()[name]["parameters"]


@pytest.mark.parametrize("name", [*sizes(), "grouped and tied"])
def test_parameter_count_agrees_with_the_module(name: str) -> None:
    config = sizes().get(name, GROUPED)
    with torch.device("meta"):
        parameters = dict(Llama(config).named_parameters())
    count = parameter_count(config)
    total = sum(parameter.numel() for parameter in parameters.values())
    embedding = sum(
        parameter.numel()
        for key, parameter in parameters.items()
        if key.startswith(("embed_tokens", "lm_head"))
    )
    assert (count.total, count.embedding) == (total, embedding)
    assert count.non_embedding == total - embedding
    if name in size_entries():
        assert size_entries()[name]["parameters"] == total


def test_an_unknown_size_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'llama-60m'"):
        size("llama-60M")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": 66}, "even multiple of heads"),
        ({"hidden_size": 68, "heads": 4, "vocab_size": 1}, "even multiple"),
        ({"kv_heads": 3}, "multiple of kv_heads"),
        ({"kv_heads": 8}, "multiple of kv_heads"),
        ({"layers": 0}, "layers must be a whole number"),
        ({"layers": 2.0}, "layers must be a whole number"),
        ({"vocab_size": True}, "vocab_size must be a whole number"),
        ({"kv_heads": 0}, "kv_heads must be"),
        ({"norm_eps": 0.0}, "norm_eps must be a positive number"),
        ({"rope_theta": float("nan")}, "rope_theta must be a positive number"),
        ({"rope_theta": "10000"}, "rope_theta must be a positive number"),
        ({"tie_embeddings": 1}, "tie_embeddings must be true or false"),
    ],
)
def test_impossible_values_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        LlamaConfig(**changes)
