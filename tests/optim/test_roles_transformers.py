"""Roles in models of Hugging Face, made from small configurations."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

import steepest
from steepest import Role

TOKENS: dict[str, Any] = {"vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GPT2: dict[str, Any] = {**TOKENS, "n_positions": 20, "n_embd": 16, "n_layer": 2, "n_head": 4}
SIZES: dict[str, Any] = {
    **TOKENS,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 20,
}
GROUPED: dict[str, Any] = {**SIZES, "num_key_value_heads": 2}
WIDE: dict[str, Any] = {**GROUPED, "head_dim": 4}
SPARSE: dict[str, Any] = {**WIDE, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
LATENT: dict[str, Any] = {
    **SPARSE,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 4,
    "qk_nope_head_dim": 4,
}
ENCODER_DECODER: dict[str, Any] = {
    **TOKENS,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
}
T5: dict[str, Any] = {
    "vocab_size": 50,
    "d_model": 16,
    "d_kv": 4,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 4,
}
IMAGES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "image_size": 8,
    "patch_size": 4,
}


@dataclass(frozen=True)
class Case:
    """A model, and its parameters of two and more dimensions that are not hidden matrices.

    Names are without the numbers of layers, and without `.weight`.
    """

    config: dict[str, Any]
    embeddings: str
    heads: str = ""
    vectors: str = ""
    doubts: str = ""
    banks: str = ""


LLAMA = Case(GROUPED, "model.embed_tokens", "lm_head")
TIED = Case(WIDE, "model.embed_tokens")
EXPERTS = "experts.gate_up_proj experts.down_proj"
FUSED = "query_key_value"
BERT = " ".join(f"bert.embeddings.{kind}_embeddings" for kind in ("word", "position", "token_type"))

CASES: dict[str, Case] = {
    "GPT2LMHeadModel": Case(GPT2, "transformer.wte transformer.wpe"),
    "GPT2Model": Case(GPT2, "wte wpe"),
    "GPT2ForSequenceClassification": Case(
        {**GPT2, "num_labels": 3}, "transformer.wte transformer.wpe", "score"
    ),
    "GPT2DoubleHeadsModel": Case(
        {**GPT2, "num_labels": 1}, "transformer.wte transformer.wpe", "multiple_choice_head.summary"
    ),
    "LlamaForCausalLM": LLAMA,
    "LlamaModel": Case(GROUPED, "embed_tokens"),
    "LlamaForTokenClassification": Case(GROUPED, "model.embed_tokens", "score"),
    "LlamaForQuestionAnswering": Case(GROUPED, "transformer.embed_tokens", "qa_outputs"),
    "PhiForCausalLM": LLAMA,
    "Phi3ForCausalLM": LLAMA,
    "GemmaForCausalLM": TIED,
    "Gemma2ForCausalLM": TIED,
    "GPTNeoXForCausalLM": Case(SIZES, "gpt_neox.embed_in", "lm_head", doubts=FUSED),
    "GPTJForCausalLM": Case({**GPT2, "rotary_dim": 4}, "transformer.wte", "lm_head"),
    "CodeGenForCausalLM": Case(
        {**GPT2, "rotary_dim": 4}, "transformer.wte", "lm_head", doubts="attn.qkv_proj"
    ),
    "FalconForCausalLM": Case(SIZES, "transformer.word_embeddings", doubts=FUSED),
    "BloomForCausalLM": Case(
        {**TOKENS, "hidden_size": 16, "n_layer": 2, "n_head": 4},
        "transformer.word_embeddings",
        doubts=FUSED,
    ),
    "OPTForCausalLM": Case(
        {**SIZES, "ffn_dim": 24, "word_embed_proj_dim": 8},
        "model.decoder.embed_tokens model.decoder.embed_positions",
    ),
    "BertForMaskedLM": Case(SIZES, BERT),
    "BertModel": Case(SIZES, BERT.replace("bert.", ""), doubts="pooler.dense"),
    "BertForSequenceClassification": Case({**SIZES, "num_labels": 3}, BERT, "classifier"),
    "RobertaForMaskedLM": Case(SIZES, BERT.replace("bert.", "roberta.")),
    "T5ForConditionalGeneration": Case(
        T5, "shared coder.block.layer.SelfAttention.relative_attention_bias"
    ),
    "BartForConditionalGeneration": Case(
        ENCODER_DECODER, "model.shared model.encoder.embed_positions model.decoder.embed_positions"
    ),
    "MixtralForCausalLM": Case(
        {**GROUPED, "num_local_experts": 3}, "model.embed_tokens", "lm_head", banks=EXPERTS
    ),
    "Qwen3MoeForCausalLM": Case(
        {**SPARSE, "num_experts": 3}, "model.embed_tokens", "lm_head", banks=EXPERTS
    ),
    "DeepseekV3ForCausalLM": Case(LATENT, "model.embed_tokens", "lm_head", banks=EXPERTS),
    "GptOssForCausalLM": Case(
        {**WIDE, "num_local_experts": 3},
        "model.embed_tokens",
        "lm_head",
        "experts.gate_up_proj_bias experts.down_proj_bias",
        banks=EXPERTS,
    ),
    "Llama4ForCausalLM": Case(
        {**WIDE, "num_local_experts": 3}, "model.embed_tokens", "lm_head", banks=EXPERTS
    ),
    "MambaForCausalLM": Case(
        {**TOKENS, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 2},
        "backbone.embeddings",
        vectors="mixer.A_log mixer.conv1d",
    ),
    "Mamba2ForCausalLM": Case(
        {**SIZES, "state_size": 4, "head_dim": 8, "num_heads": 4, "n_groups": 1},
        "backbone.embeddings",
        "lm_head",
        "mixer.conv1d",
    ),
    "Qwen3NextForCausalLM": Case(
        {
            **SPARSE,
            "num_experts": 3,
            "shared_expert_intermediate_size": 12,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 4,
            "linear_value_head_dim": 4,
            "layer_types": ["linear_attention", "full_attention"],
        },
        "model.embed_tokens",
        "lm_head",
        "linear_attn.conv1d",
        banks=EXPERTS,
    ),
    "MusicgenForCausalLM": Case(
        {**SIZES, "ffn_dim": 24, "num_codebooks": 2}, "model.decoder.embed_tokens", "lm_heads"
    ),
    "ViTForImageClassification": Case(
        {**IMAGES, "num_labels": 3},
        "vit.embeddings.patch_embeddings.projection vit.embeddings.position_embeddings",
        "classifier",
        "vit.embeddings.cls_token",
        "vit.embeddings.position_embeddings",
    ),
    "WhisperForConditionalGeneration": Case(
        {
            **ENCODER_DECODER,
            "decoder_start_token_id": 1,
            "num_mel_bins": 8,
            "max_source_positions": 20,
            "max_target_positions": 20,
        },
        # The positions of its encoder are fixed, and the encoder says that it embeds by conv1.
        "model.encoder.conv1 model.decoder.embed_tokens model.decoder.embed_positions",
    ),
}


def make(name: str, config: dict[str, Any]) -> nn.Module:
    import transformers

    model: Any = getattr(transformers, name)
    made: nn.Module = model(model.config_class(**config))
    return made


def short(name: str) -> str:
    """Return a parameter's name without the numbers of layers and `.weight`."""
    return re.sub(r"\.\d+(?=\.|$)", "", name.removesuffix(".weight"))


def ends(names: set[str], of: str) -> None:
    """Assert that every name ends like one of those in `of`, and each of them has one."""
    wanted = of.split()
    assert {name for name in names if not name.endswith(tuple(wanted))} == set()
    assert {end for end in wanted if not any(name.endswith(end) for name in names)} == set()


@pytest.mark.parametrize("name", CASES)
def test_roles(name: str) -> None:
    model, case = make(name, CASES[name].config), CASES[name]
    found = steepest.roles(model)
    parameters = {path: p for path, p in model.named_parameters() if p.requires_grad}
    assert found.keys() == parameters.keys()
    roles: dict[Role, set[str]] = {role: set() for role in Role}
    for path, named in found.items():
        if parameters[path].ndim > 1:
            roles[named.role].add(short(path))
        else:
            assert named.role is Role.VECTOR
    for role, of in (
        (Role.EMBEDDING, case.embeddings),
        (Role.HEAD, case.heads),
        (Role.VECTOR, case.vectors),
    ):
        ends(roles[role], of)
    ends({short(path) for path, named in found.items() if named.doubt}, case.doubts)
    ends({short(path) for path, named in found.items() if named.bank}, case.banks)
    assert roles[Role.HIDDEN]


def test_gpt2_steps_without_a_warning() -> None:
    model: Any = make("GPT2LMHeadModel", GPT2)
    found = steepest.roles(model)
    table = found["transformer.wte.weight"]
    assert table.reason == "shared by transformer.wte.weight and lm_head"
    hidden = {name: named for name, named in found.items() if named.role is Role.HIDDEN}
    assert len(hidden) == 8
    for name, named in hidden.items():
        assert named.transposed
        assert named.split == ((16, 16, 16) if "c_attn" in name else None)
    assert found["transformer.h.1.attn.c_attn.weight"].heads == 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = steepest.create("muon", model)
    tokens = torch.arange(10).view(1, -1)
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    state = optimizer.state[model.transformer.h[0].attn.c_attn.weight]
    assert {k: tuple(v.shape) for k, v in state.items() if k != "step"} == {
        f"momentum.{block}": (16, 16) for block in range(3)
    }


@pytest.mark.parametrize("tied", [False, True])
def test_llama(tied: bool) -> None:
    found = steepest.roles(make("LlamaForCausalLM", {**GROUPED, "tie_word_embeddings": tied}))
    assert found["model.embed_tokens.weight"].role is Role.EMBEDDING
    assert ("lm_head.weight" in found) is not tied
    assert tied or found["lm_head.weight"].reason == "the model's output embeddings"
    attention = "model.layers.0.self_attn"
    assert found[f"{attention}.q_proj.weight"].heads == 4
    assert found[f"{attention}.k_proj.weight"].heads == 2
    hidden = [name for name, named in found.items() if named.role is Role.HIDDEN]
    assert len(hidden) == 14
    assert not any(named.transposed or named.split for named in found.values())


def test_fused_matrices_of_groups() -> None:
    fused = steepest.roles(make("Phi3ForCausalLM", GROUPED))
    qkv = fused["model.layers.0.self_attn.qkv_proj.weight"]
    assert (qkv.split, qkv.heads) == ((16, 8, 8), 4)


@pytest.mark.parametrize(
    ("name", "turned"),
    [("MixtralForCausalLM", False), ("GptOssForCausalLM", True), ("Llama4ForCausalLM", True)],
)
def test_experts_are_stacked_as_their_model_has_them(name: str, turned: bool) -> None:
    model = make(name, CASES[name].config)
    stacked = {path: named for path, named in steepest.roles(model).items() if named.bank}
    assert len(stacked) == 4 if name != "Llama4ForCausalLM" else 2
    assert {named.transposed for named in stacked.values()} == {turned}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = steepest.create("muon", model)
    parameter = dict(model.named_parameters())[next(iter(stacked))]
    parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    assert sorted(optimizer.state[parameter])[:3] == [f"momentum.{i}" for i in range(3)]
