"""Initial weights by scheme.

"normal" draws every matrix and table with deviation `init_std`, as GaLore and the LLaMA code of
Hugging Face, flash-linear-attention and levanter do. "scaled" divides the deviation of the
matrices that write into the residual stream, two in each layer, by sqrt(2 * layers), so that the
stream starts at the same size at any depth: GPT-2 (Radford et al., 2019, section 2.3), nanoGPT,
the EPFL benchmark (arXiv:2509.01440).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from steepest.models.config import ModelConfig
from steepest.models.mup import MuPConfig


def deviation(config: ModelConfig, *, table: bool, residual_output: bool) -> float:
    """Return the standard deviation of the initial weights of a table, or of a layer's matrix."""
    if table:
        return config.init_std
    std = config.init_std
    if isinstance(config, MuPConfig):
        std /= math.sqrt(config.width_factor)
    if residual_output and config.init == "scaled":
        std /= math.sqrt(2 * config.layers)
    return std


def draw_normal(parameter: Tensor, std: float, generator: torch.Generator) -> None:
    """Fill a parameter with normal numbers, drawn in float32 on the generator's device.

    With a CPU generator the values depend on its seed alone, not on the device or dtype of the
    parameter.
    """
    values = torch.empty(parameter.shape, dtype=torch.float32, device=generator.device)
    parameter.copy_(values.normal_(0.0, std, generator=generator))
