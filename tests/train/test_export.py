"""What is exported, loaded by Hugging Face's Auto classes: the same logits, tokens and endings."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from steepest.data.symbols import ByteTokenizer, CharacterTokenizer
from steepest.errors import UserError
from steepest.models import (
    DeltaNetConfig,
    GatedDeltaNetConfig,
    GLAConfig,
    GPT2Config,
    LanguageModel,
    LlamaConfig,
    ModelConfig,
    MoEConfig,
    build,
)
from steepest.models.generation import generate
from steepest.train.export import write

transformers = pytest.importorskip("transformers")

BYTES = ByteTokenizer()
COMMON: dict[str, Any] = {
    "vocab_size": 264,
    "hidden_size": 32,
    "layers": 2,
    "heads": 4,
    "max_sequence_length": 48,
}
LLAMA = LlamaConfig(**COMMON, intermediate_size=40)
GPT2 = GPT2Config(**COMMON)
MOE = MoEConfig(**COMMON, intermediate_size=24, experts=5)
MUP: dict[str, Any] = {"mup_base_width": 8, "embedding_scale": 3.0, "depth_scale": 1.4}


def randomised(config: ModelConfig) -> LanguageModel:
    """Return a model with gains and biases that matter and logits far from flat."""
    model, noise = build(config), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(torch.randn(p.shape, generator=noise) * 0.3)
            else:
                p.mul_(5)
    return model


def tokens(batch: int = 3, time: int = 33) -> Tensor:
    return torch.randint(257, (batch, time), generator=torch.Generator().manual_seed(0))


def load(folder: Path) -> Any:
    """Return the model that AutoModelForCausalLM makes, which has found all its weights."""
    model, told = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True
    )
    assert not any(told.values()), told
    return model.eval()


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        (LLAMA, {}),
        (LLAMA, {"kv_heads": 2, "rope_theta": 500_000.0, "norm_eps": 1e-6}),
        (LLAMA, {"tie_embeddings": True}),
        (LLAMA, {**MUP, "kv_heads": 1}),
        (LLAMA, {**MUP, "tie_embeddings": True}),
        (GPT2, {"bias": True, "activation": "gelu_tanh"}),
        (GPT2, {"bias": False, "tie_embeddings": False, "intermediate_size": 40}),
        (GPT2, {**MUP, "bias": True}),
        (GPT2, {**MUP, "tie_embeddings": False}),
        (MOE, {}),
        (MOE, {**MUP, "kv_heads": 2, "tie_embeddings": True, "experts_per_token": 3}),
    ],
    ids=lambda value: str(getattr(value, "architecture", value)),
)
def test_logits_are_the_same(config: ModelConfig, changes: dict[str, Any], tmp_path: Path) -> None:
    config = dataclasses.replace(config, **changes)
    model = randomised(config)
    write(tmp_path / "model", config, model.state_dict(), BYTES)
    theirs = load(tmp_path / "model")
    with torch.no_grad():
        ours, expected = model(tokens()), theirs(input_ids=tokens()).logits
    assert (ours - expected).norm() <= 1e-5 * expected.norm()
    assert theirs.config.tie_word_embeddings == config.tie_embeddings
    described = json.loads((tmp_path / "model" / "config.json").read_text())
    assert described["architectures"] == [type(theirs).__name__]
    assert theirs.dtype == torch.float32
    assert theirs.config.max_position_embeddings == 48


def test_the_folder_is_complete_and_readable_by_others(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "model"
    write(folder, LLAMA, build(LLAMA).state_dict(), BYTES)
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "steepest-tokenizer.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert folder.stat().st_mode & 0o777 == 0o755
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in folder.iterdir())
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("kind", ["bytes", "chars"])
def test_the_tokenizer_is_the_same(kind: str, tmp_path: Path) -> None:
    texts = ["naïve <|endoftext|> 日本\r\n  two", "x", "= 1.5e3 it's\tthere"]
    ours = BYTES if kind == "bytes" else CharacterTokenizer.train(texts)
    config = dataclasses.replace(LLAMA, layers=1)
    write(tmp_path / "model", config, build(config).state_dict(), ours)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    for text, ids in zip(texts, ours.encode_batch(texts), strict=True):
        assert theirs(text, split_special_tokens=True)["input_ids"] == ids.tolist()
        assert theirs.decode(ids.tolist()) == text
    assert theirs.eos_token_id == ours.end


def test_generation_ends_where_ours_does(tmp_path: Path) -> None:
    model = randomised(LLAMA)
    prompt = tokens(3, 5)
    # The tokens of some row after the prompt, of which one is made the end.
    end = int(generate(model, prompt, 12)[0, 9])
    tokenizer = ByteTokenizer()
    tokenizer.end = end
    write(tmp_path / "model", LLAMA, model.state_dict(), tokenizer)
    theirs = load(tmp_path / "model").generate(prompt, do_sample=False, max_new_tokens=12)
    ours = generate(model, prompt, 12, end=end)
    assert torch.equal(theirs, ours[:, : theirs.shape[1]])
    assert (ours[:, theirs.shape[1] :] == end).all()
    assert (ours[0, 10:] == end).all()


def test_bfloat16(tmp_path: Path) -> None:
    config = dataclasses.replace(LLAMA, layers=1)
    model = randomised(config)
    write(tmp_path / "model", config, model.state_dict(), BYTES, "bfloat16")
    theirs = load(tmp_path / "model")
    assert theirs.dtype == torch.bfloat16
    assert torch.equal(theirs.lm_head.weight, model.lm_head.weight.bfloat16())
    size = sum(2 * p.numel() for p in model.parameters())
    assert 0 <= (tmp_path / "model" / "model.safetensors").stat().st_size - size < 4096


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (GLAConfig(), "architecture gla cannot be exported.* no class"),
        (DeltaNetConfig(), "architecture deltanet"),
        (GatedDeltaNetConfig(), "architecture gated_deltanet"),
        (dataclasses.replace(GPT2, parallel_block=True), "parallel_block.* no class"),
        (dataclasses.replace(MOE, routing="expert_choice"), "routing expert_choice"),
        (dataclasses.replace(MOE, gates="softmax_topk"), "gates softmax_topk"),
        (dataclasses.replace(MOE, shared_experts=1), "shared experts"),
    ],
    ids=lambda value: str(getattr(value, "architecture", "")),
)
def test_what_no_class_computes_is_an_error(
    config: ModelConfig, reason: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=reason):
        write(tmp_path / "model", config, build(config).state_dict(), BYTES)
    assert not list(tmp_path.iterdir())


class Unsaveable(ByteTokenizer):
    def save(self, folder: Path) -> None:
        assert (folder / "model.safetensors").exists()
        raise OSError(28, "No space left on device")

    def decode(self, ids: Sequence[int]) -> str:
        raise NotImplementedError


def test_half_a_folder_is_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model cannot be written: No space left on device\.$"):
        write(tmp_path / "model", LLAMA, build(LLAMA).state_dict(), Unsaveable())
    assert not list(tmp_path.iterdir())


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    weights = build(LLAMA).state_dict()
    folder = tmp_path / "model"
    folder.mkdir()
    write(folder, LLAMA, weights, BYTES)  # it was empty
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    for out in (folder, folder / "config.json"):
        with pytest.raises(UserError, match="exists and is not an empty folder; choose another"):
            write(out, LLAMA, weights, BYTES)
    assert before == {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    with pytest.raises(UserError, match="cannot be written: File exists"):
        write(folder / "config.json" / "model", LLAMA, weights, BYTES)
