"""How many floating point operations a token of training costs.

Counted is what has to be multiplied, once: 2 operations per weight of every matrix that a token
goes through (of experts, those it is routed to; of the embedding, none: it is looked up), the
products of the token mixer, and twice of all that again for the backward pass. Norms, gates,
convolutions, the optimizer, and what activation checkpointing computes again are left out.

Attention counts as if every position saw all of the sequence, 12 layers heads head_size
sequence_length, without a discount for causality, which is how torchtitan and most tables of model
FLOPs utilisation have it (Chowdhery et al., 2022, arXiv:2204.02311, appendix B).
"""

from __future__ import annotations

from functools import cache

import torch
from torch import nn

from steepest.models.chunked import CHUNK
from steepest.models.config import ModelConfig
from steepest.models.experts import Experts
from steepest.models.gpt2 import GPT2Config
from steepest.models.linear_attention_config import (
    DeltaNetConfig,
    GatedDeltaNetConfig,
    GLAConfig,
    LinearAttentionConfig,
)
from steepest.models.llama import LlamaConfig
from steepest.models.moe import MoEConfig
from steepest.models.sizes import build

TRAINING = 3
"""Passes worth of work: one forward, and gradients of inputs and of weights."""


@cache
def training_flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """Return the operations of forward and backward pass per token of such sequences."""
    mixing = config.layers * _mixing(config, sequence_length)
    return TRAINING * (2 * multiplied_weights(config) + mixing)


@cache
def multiplied_weights(config: ModelConfig) -> float:
    """Return how many weights of matrices a token is multiplied by, a tied head included."""
    with torch.device("meta"):
        model = build(config)
    total = 0.0
    for module in model.modules():
        if isinstance(module, nn.Linear):
            total += module.weight.numel()
        elif isinstance(module, Experts):
            assert isinstance(config, MoEConfig)
            used = (
                config.experts_per_token
                if config.routing == "token_choice"
                else min(config.capacity_factor, config.routed_experts)
            )
            total += sum(p.numel() for p in module.parameters()) * used / config.routed_experts
    return total


def _mixing(config: ModelConfig, sequence_length: int) -> float:
    """Return the operations of one layer's token mixer per token, forward alone."""
    if isinstance(config, LlamaConfig | GPT2Config):
        return 4 * config.heads * config.head_size * sequence_length
    assert isinstance(config, LinearAttentionConfig)
    keys, values = config.key_size, config.value_size
    if isinstance(config, GLAConfig):  # the state read and written; scores, and values by them
        head = 4 * keys * values + 2 * CHUNK * (keys + values)
    else:  # also what a key recalls; the Gram matrix, the inverse, and keys and values by it
        assert isinstance(config, DeltaNetConfig | GatedDeltaNetConfig)
        head = 6 * keys * values + 2 * CHUNK * (3 * keys + 2 * values) + CHUNK**2
    return config.heads * head
