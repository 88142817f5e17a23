"""Named sizes, their published totals, and the validation of a config."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from steepest.errors import UserError
from steepest.models import (
    GPT2Config,
    LlamaConfig,
    parameter_count,
    size,
    size_entries,
    sizes,
)

# The configs of GaLore and scaling-for-scaling, of epfml/llm-optimizer-benchmark, of Llama 3 and of
# OpenAI's weights, counted by their own code.
PUBLISHED = {
    "llama-9m": 8_995_968,
    "llama-20m": 19_548_416,
    "llama-35m": 35_197_824,
    "llama-40m": 42_392_480,
    "llama-60m": 58_073_600,
    "llama-71m": 70_578_688,
    "llama-100m": 100_117_120,
    "llama-130m": 134_105_856,
    "llama-250m": 247_370_496,
    "llama-350m": 367_969_280,
    "llama-1b": 1_339_082_752,
    "llama-3b": 2_685_831_680,
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "epfl-124m": 123_587_328,
    "epfl-210m": 208_540_416,
    "epfl-583m": 583_232_640,
    "epfl-720m": 719_636_480,
    "epfl-base-124m": 123_980_544,
    "epfl-moe-520m": 520_022_784,
    "llama3-8b": 8_030_261_248,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "gpt2-124m": 124_439_808,
    "gpt2-355m": 354_823_168,
    "gpt2-774m": 774_030_080,
    "gpt2-1.5b": 1_557_611_200,
}
# Parameters of the matrices between layers, as published.
MATRICES = {
    "fantastic-130m": 134_217_728,
    "fantastic-300m": 301_989_888,
    "fantastic-520m": 536_870_912,
    "fantastic-1.2b": 1_207_959_552,
}


def test_every_size_has_a_source_and_only_known_keys() -> None:
    for name, entry in size_entries().items():
        fields = {field.name for field in dataclasses.fields(size(name))}
        assert entry["source"], name
        assert set(entry) <= fields | {"source", "note", "parameters"}, name


@pytest.mark.parametrize("name", sizes())
def test_a_size_has_the_parameters_that_its_entry_states(name: str) -> None:
    assert parameter_count(size(name)).total == size_entries()[name]["parameters"]


def test_totals_are_the_published_ones() -> None:
    for name, total in PUBLISHED.items():
        assert parameter_count(size(name)).total == total, name
    for name, matrices in MATRICES.items():
        gains = (2 * size(name).layers + 1) * size(name).hidden_size
        assert parameter_count(size(name)).non_embedding == matrices + gains, name


def test_active_parameters_leave_idle_experts_out() -> None:
    assert parameter_count(size("epfl-moe-520m")).active == 180_284_160  # published
    assert parameter_count(size("llama-60m")).active == 58_073_600
    shared = dataclasses.replace(size("epfl-moe-520m"), shared_experts=1)
    assert parameter_count(shared).total == 520_013_568  # published


def test_tables_of_tokens_and_positions_are_counted_as_embedding() -> None:
    untied, tied = GPT2Config(tie_embeddings=False), GPT2Config()
    table, places = 1024 * 64, 2048 * 64
    assert parameter_count(untied).embedding == 2 * table + places
    assert parameter_count(tied).embedding == table + places
    assert parameter_count(LlamaConfig(tie_embeddings=True)).embedding == table


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


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"heads": 5}, "multiple of heads"),
        ({"bias": 1}, "bias must be true or false"),
        ({"activation": "relu"}, "one of gelu, gelu_tanh"),
        ({"mup_base_width": 0}, "mup_base_width must be a whole number"),
        ({"depth_scale": -1.0}, "depth_scale must be a positive number"),
        ({"init": "xavier"}, "one of scaled, normal"),
    ],
)
def test_impossible_values_of_gpt2_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        GPT2Config(**changes)
