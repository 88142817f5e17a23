"""Language models to train: LLaMA in named sizes."""

from steepest.models.config import (
    LlamaConfig,
    ParameterCount,
    parameter_count,
    size,
    size_entries,
    sizes,
)
from steepest.models.llama import Llama

__all__ = [
    "Llama",
    "LlamaConfig",
    "ParameterCount",
    "parameter_count",
    "size",
    "size_entries",
    "sizes",
]
