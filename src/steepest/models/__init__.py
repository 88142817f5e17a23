"""Language models to train, by architecture and by named size."""

from steepest.models.config import ModelConfig
from steepest.models.gpt2 import GPT2, GPT2Config
from steepest.models.language_model import LanguageModel, Loss
from steepest.models.llama import Llama, LlamaConfig
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
    "GPT2",
    "Config",
    "GPT2Config",
    "LanguageModel",
    "Llama",
    "LlamaConfig",
    "Loss",
    "ModelConfig",
    "MuPConfig",
    "ParameterCount",
    "build",
    "lr_multipliers",
    "parameter_count",
    "size",
    "size_entries",
    "sizes",
]
