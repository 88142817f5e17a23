"""Language models to train, by architecture and by named size."""

from steepest.models.config import ModelConfig
from steepest.models.flops import training_flops_per_token
from steepest.models.gpt2 import GPT2, GPT2Config
from steepest.models.language_model import LanguageModel, Loss
from steepest.models.linear_attention import GLA, DeltaNet, GatedDeltaNet
from steepest.models.linear_attention_config import DeltaNetConfig, GatedDeltaNetConfig, GLAConfig
from steepest.models.llama import Llama, LlamaConfig
from steepest.models.moe import MoEConfig, MoELlama
from steepest.models.mup import MuPConfig, lr_multipliers
from steepest.models.sizes import (
    ARCHITECTURES,
    Config,
    ParameterCount,
    build,
    parameter_count,
    size,
    size_entries,
    sizes,
)

__all__ = [
    "ARCHITECTURES",
    "GLA",
    "GPT2",
    "Config",
    "DeltaNet",
    "DeltaNetConfig",
    "GLAConfig",
    "GPT2Config",
    "GatedDeltaNet",
    "GatedDeltaNetConfig",
    "LanguageModel",
    "Llama",
    "LlamaConfig",
    "Loss",
    "MoEConfig",
    "MoELlama",
    "ModelConfig",
    "MuPConfig",
    "ParameterCount",
    "build",
    "lr_multipliers",
    "parameter_count",
    "size",
    "size_entries",
    "sizes",
    "training_flops_per_token",
]
