"""The architectures by name, the named sizes of `sizes.toml`, and counts of parameters."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import torch

from steepest.errors import UserError, unknown
from steepest.models.config import ModelConfig
from steepest.models.gpt2 import GPT2, GPT2Config
from steepest.models.language_model import LanguageModel
from steepest.models.linear_attention import GLA, DeltaNet, GatedDeltaNet
from steepest.models.linear_attention_config import DeltaNetConfig, GatedDeltaNetConfig, GLAConfig
from steepest.models.llama import Llama, LlamaConfig
from steepest.models.moe import MoEConfig, MoELlama

Config = LlamaConfig | GPT2Config | MoEConfig | GLAConfig | DeltaNetConfig | GatedDeltaNetConfig
"""The config of any architecture; its field `architecture` says of which."""

ARCHITECTURES: dict[str, tuple[type[Config], Callable[..., LanguageModel]]] = {
    "llama": (LlamaConfig, Llama),
    "gpt2": (GPT2Config, GPT2),
    "moe": (MoEConfig, MoELlama),
    "gla": (GLAConfig, GLA),
    "deltanet": (DeltaNetConfig, DeltaNet),
    "gated_deltanet": (GatedDeltaNetConfig, GatedDeltaNet),
}


def build(config: ModelConfig, generator: torch.Generator | None = None) -> LanguageModel:
    """Return a model of this config whose initial weights are those of `generator` (or seed 0)."""
    for kind, model in ARCHITECTURES.values():
        if type(config) is kind:
            return model(config, generator)
    raise UserError(f"{type(config).__name__} is not the config of a model of steepest.")


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of trainable scalars; `total` is the sum of the next two.

    `embedding` is the token embedding, learned positions and, unless tied, the output head;
    `active` leaves out of the total the experts that a token does not go through.
    """

    total: int
    embedding: int
    non_embedding: int
    active: int


@cache
def parameter_count(config: ModelConfig) -> ParameterCount:
    """Count the parameters of a model, exactly and without allocating it."""
    with torch.device("meta"):
        model = build(config)
    total = sum(p.numel() for p in model.parameters())
    embedding = sum(
        p.numel() for name, p in model.named_parameters() if name.startswith(model.embeddings)
    )
    idle = config.idle_parameters if isinstance(config, MoEConfig) else 0
    return ParameterCount(total, embedding, total - embedding, total - idle)


def sizes() -> dict[str, Config]:
    """Return the named sizes of `sizes.toml`, in the order of the file."""
    return {name: _config(entry) for name, entry in size_entries().items()}


def _config(entry: dict[str, Any]) -> Config:
    kind, _ = ARCHITECTURES[entry.get("architecture", "llama")]
    fields = {field.name for field in dataclasses.fields(kind)}
    return kind(**{key: value for key, value in entry.items() if key in fields})


def size(name: str) -> Config:
    """Return the size called `name`; raise UserError naming the nearest one if there is none."""
    known = sizes()
    if name not in known:
        raise unknown("model size", name, known)
    return known[name]


@cache
def size_entries() -> dict[str, dict[str, Any]]:
    """Return `sizes.toml` as it is: besides the fields, `source`, `note` and `parameters`."""
    text = resources.files("steepest.models").joinpath("sizes.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)
