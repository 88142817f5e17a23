"""A model as the classes of Hugging Face's library `transformers` have it.

    llama   LlamaForCausalLM
    gpt2    GPT2LMHeadModel
    moe     MixtralForCausalLM

Factors for which these have no setting, those of `steepest.models.mup`, are multiplied into the
weights next to them. A head that is the embedding table gets the table's factor, too; the gain of
the last norm takes it back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from steepest.errors import UserError
from steepest.models.config import ModelConfig
from steepest.models.gpt2 import GPT2Config
from steepest.models.llama import LlamaConfig
from steepest.models.moe import MoEConfig

Weights = Mapping[str, Tensor]

LLAMA_NAMES = {
    "attention_norm": "input_layernorm",
    "attention": "self_attn",
    "mlp_norm": "post_attention_layernorm",
}
MIXTRAL_NAMES = {**LLAMA_NAMES, "mlp": "block_sparse_moe", "router": "gate"}
# As the experts' matrices are called in files of Mixtral, an entry for each expert.
MIXTRAL_EXPERTS = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
GPT2_NAMES = {
    "attention_norm": "ln_1",
    "attention.o_proj": "attn.c_proj",
    "mlp_norm": "ln_2",
    "mlp.up_proj": "mlp.c_fc",
    "mlp.down_proj": "mlp.c_proj",
}
GPT2_ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_new"}


def convert(config: ModelConfig, weights: Weights) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the content of config.json and the tensors, by their names there, of a state dict.

    The model that Hugging Face makes of them gives the same logits. Raises UserError, naming the
    reason, for a model that no class there computes.
    """
    if isinstance(config, MoEConfig):
        return _mixtral_config(config), _mixtral_weights(config, _folded(config, weights))
    if isinstance(config, LlamaConfig):
        return _llama_config(config), _llama_weights(_folded(config, weights))
    if isinstance(config, GPT2Config):
        return _gpt2_config(config), _gpt2_weights(config, _folded(config, weights))
    raise UserError(
        f"A model of the architecture {getattr(config, 'architecture', '?')} cannot be exported: "
        "the library transformers has no class for it."
    )


def _folded(config: LlamaConfig | GPT2Config, weights: Weights) -> dict[str, Tensor]:
    """Return the weights of a model without factors; the head is left out where it is the table."""
    return {
        name: weight if (factor := _factor(config, name)) == 1 else weight * factor
        for name, weight in weights.items()
        if not (config.tie_embeddings and name == "lm_head.weight")
    }


def _factor(config: LlamaConfig | GPT2Config, name: str) -> float:
    """Return what a weight or bias is to be multiplied by."""
    modules = name.split(".")
    if modules[0] in ("embed_tokens", "embed_positions"):
        return config.embedding_scale
    if modules[0] == "norm":
        return 1 / config.width_factor / (config.embedding_scale if config.tie_embeddings else 1)
    if "q_proj" in modules:
        scale = config.attention_scale(config.head_size)
        return 1 if scale is None else scale * math.sqrt(config.head_size)
    return config.branch_scale if {"o_proj", "down_proj"} & set(modules) else 1


def _common(config: ModelConfig, kind: str, architecture: str) -> dict[str, Any]:
    return {
        "architectures": [architecture],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init_std,
    }


def _llama_config(config: LlamaConfig) -> dict[str, Any]:
    return {
        **_common(config, "llama", "LlamaForCausalLM"),
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.key_value_heads,
        "intermediate_size": config.intermediate_size,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_sequence_length,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
    }


def _llama_weights(weights: Weights) -> dict[str, Tensor]:
    return {_renamed(name, LLAMA_NAMES): weight for name, weight in weights.items()}


def _mixtral_config(config: MoEConfig) -> dict[str, Any]:
    for wrong, what in (
        (config.routing != "token_choice", f"routing {config.routing}"),
        (config.gates != "topk_softmax", f"gates {config.gates}"),
        (config.shared_experts > 0, "shared experts"),
    ):
        if wrong:
            raise UserError(
                f"A mixture of experts with {what} cannot be exported: Mixtral's experts are all "
                "routed, by token_choice with gates topk_softmax."
            )
    return {
        **_llama_config(config),
        **_common(config, "mixtral", "MixtralForCausalLM"),
        "num_local_experts": config.experts,
        "num_experts_per_tok": config.experts_per_token,
        "router_aux_loss_coef": config.balance_loss,
        "sliding_window": None,
    }


def _mixtral_weights(config: MoEConfig, weights: Weights) -> dict[str, Tensor]:
    result = {}
    for name, weight in weights.items():
        place, _, matrix = name.rpartition(".experts.")
        if not place:
            result[_renamed(name, MIXTRAL_NAMES)] = weight
            continue
        for number in range(config.experts):
            one = f"{place}.experts.{number}.{MIXTRAL_EXPERTS[matrix]}.weight"
            result[_renamed(one, MIXTRAL_NAMES)] = weight[number]
    return result


def _renamed(name: str, names: Mapping[str, str]) -> str:
    """Rename each part of a name; all but the head is under "model."."""
    inner = ".".join(names.get(part, part) for part in name.split("."))
    return inner if inner.startswith("lm_head.") else f"model.{inner}"


def _gpt2_config(config: GPT2Config) -> dict[str, Any]:
    if config.parallel_block:
        raise UserError(
            "A gpt2 with parallel_block cannot be exported: the library transformers has no class "
            "with such blocks and learned positions."
        )
    return {
        **_common(config, "gpt2", "GPT2LMHeadModel"),
        "n_embd": config.hidden_size,
        "n_layer": config.layers,
        "n_head": config.heads,
        "n_inner": config.mlp_size,
        "n_positions": config.max_sequence_length,
        "activation_function": GPT2_ACTIVATIONS[config.activation],
        "layer_norm_epsilon": config.norm_eps,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "resid_pdrop": 0.0,
    }


def _gpt2_weights(config: GPT2Config, weights: Weights) -> dict[str, Tensor]:
    """Return [in, out] matrices, those of query, key and value side by side, all with biases."""
    result = {
        "transformer.wte.weight": weights["embed_tokens.weight"],
        "transformer.wpe.weight": weights["embed_positions.weight"],
    }
    if not config.tie_embeddings:
        result["lm_head.weight"] = weights["lm_head.weight"]

    def put(theirs: str, *ours: str) -> None:
        weight = torch.cat([weights[f"{name}.weight"] for name in ours])
        result[f"transformer.{theirs}.weight"] = weight.T if weight.ndim == 2 else weight
        result[f"transformer.{theirs}.bias"] = (
            torch.cat([weights[f"{name}.bias"] for name in ours])
            if config.bias
            else weight.new_zeros(len(weight))
        )

    for number in range(config.layers):
        block = f"layers.{number}"
        put(f"h.{number}.attn.c_attn", *(f"{block}.attention.{part}_proj" for part in "qkv"))
        for ours, theirs in GPT2_NAMES.items():
            put(f"h.{number}.{theirs}", f"{block}.{ours}")
    put("ln_f", "norm")
    return result
