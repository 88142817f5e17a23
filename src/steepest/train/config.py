"""What a run is: all that can change a loss (`RunConfig`), and what cannot (`Runtime`).

A `RunConfig` maps one to one onto a TOML file and onto command-line flags; the text under each
field is its help. `RunConfig.hash()` is the run's identity.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from steepest import models
from steepest.errors import UserError
from steepest.train import identity, parsing

Option = bool | int | float | str | list[bool] | list[int] | list[float] | list[str]


def _require(condition: bool, sentence: str) -> None:
    if not condition:
        raise UserError(sentence)


def _at_least(section: str, name: str, value: int, least: int) -> None:
    _require(value >= least, f"{section}.{name} must be at least {least}, not {value}.")


@dataclass(frozen=True)
class DataConfig:
    """The text, its tokens and how they are cut into batches."""

    corpus: str = "sotu"
    """Name of an embedded corpus, or path of a .txt file or of a folder of .txt files."""
    vocab_size: int = 1024
    """Number of tokens of the tokenizer that is trained on the corpus."""
    sequence_length: int = 128
    """Tokens per sequence."""
    batch_size: int = 16
    """Sequences per optimizer step, over all gradient accumulation steps."""
    fingerprint: str = ""
    """Content hash of texts, tokenizer and split. Filled in by the run; if given, it is checked."""

    def __post_init__(self) -> None:
        _require(bool(self.corpus), "data.corpus must name a corpus or a path, and is empty.")
        _at_least("data", "vocab_size", self.vocab_size, 2)
        _at_least("data", "sequence_length", self.sequence_length, 1)
        _at_least("data", "batch_size", self.batch_size, 1)


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer and its own hyperparameters."""

    name: str = "adamw"
    """Name in the catalogue, or "path/to/file.py:Class", or "package.module:Class"."""
    lr: float = 1e-3
    """Peak learning rate."""
    options: dict[str, Option] = field(default_factory=dict)
    """The optimizer's other hyperparameters, by the names its constructor has for them."""
    source_sha256: str = ""
    """Content hash of the file of a class given by path or module. Filled in; if given, checked."""

    def __post_init__(self) -> None:
        _require(bool(self.name), "optimizer.name must name an optimizer, and is empty.")
        _require(
            math.isfinite(self.lr) and self.lr > 0,
            f"optimizer.lr must be a positive number, not {self.lr}.",
        )
        _require(
            "lr" not in self.options,
            "optimizer.options must not hold lr; the learning rate is optimizer.lr.",
        )
        for name, value in self.options.items():
            for number in value if isinstance(value, (list, tuple)) else [value]:
                _require(
                    not isinstance(number, float) or math.isfinite(number),
                    f"optimizer.options.{name} must be finite, not {number}.",
                )


@dataclass(frozen=True)
class ScheduleConfig:
    """How the learning rate changes over the run, as a multiple of its peak."""

    name: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """Shape after warmup; wsd (warmup, stable, decay) holds the peak, then decays linearly."""
    warmup_steps: int = 20
    """Steps of linear warmup; the first step has 1/warmup_steps of the peak."""
    final_lr_ratio: float = 0.1
    """Multiple of the peak at the last step (constant has none)."""
    decay_fraction: float = 0.2
    """Part of all steps over which wsd decays (the other schedules have none)."""

    def __post_init__(self) -> None:
        _at_least("schedule", "warmup_steps", self.warmup_steps, 0)
        _require(
            0 <= self.final_lr_ratio <= 1,
            f"schedule.final_lr_ratio must be between 0 and 1, not {self.final_lr_ratio}.",
        )
        _require(
            0 < self.decay_fraction <= 1,
            f"schedule.decay_fraction must be above 0 and at most 1, not {self.decay_fraction}.",
        )


@dataclass(frozen=True)
class TrainingConfig:
    """Length, seed and numerics of the run, and when it is evaluated."""

    steps: int = 600
    """Number of optimizer steps."""
    seed: int = 0
    """Seed of the initial weights and the order of the batches; validation is the same for all."""
    gradient_accumulation: int = 1
    """Equal parts that a batch is split into to save memory; divides data.batch_size."""
    clip_norm: float = 1.0
    """Largest global gradient norm; larger gradients are scaled down to it. 0 means no clipping."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 is autocast: weights and optimizer state stay in float32."""
    compile: bool = False
    """Compile the model's forward and backward pass with torch.compile."""
    eval_every: int = 60
    """Steps between evaluations; there is one before the first step and after the last, too."""
    eval_tokens: int = 32_768
    """Held-out tokens per evaluation, the same ones every time; at most the whole held-out set."""

    def __post_init__(self) -> None:
        _at_least("training", "steps", self.steps, 1)
        _require(
            0 <= self.seed < 2**63,
            f"training.seed must be between 0 and 2^63 - 1, not {self.seed}.",
        )
        _at_least("training", "gradient_accumulation", self.gradient_accumulation, 1)
        _require(
            math.isfinite(self.clip_norm) and self.clip_norm >= 0,
            f"training.clip_norm must be 0 (off) or a positive number, not {self.clip_norm}.",
        )
        _at_least("training", "eval_every", self.eval_every, 1)
        _at_least("training", "eval_tokens", self.eval_tokens, 1)


@dataclass(frozen=True)
class Runtime:
    """Where and how a run executes. None of it is part of the run's identity."""

    device: str = "cpu"
    """Device to train on: cpu, cuda or cuda:N."""
    threads: int | None = None
    """CPU threads of torch; torch's own choice if not given. 1 makes CPU runs equal to the bit."""
    checkpoint_every: int = 100
    """Steps between checkpoints; 0 keeps none, and a killed run then starts again."""
    log_every: int = 10
    """Steps between training records in metrics.jsonl."""

    def __post_init__(self) -> None:
        _require(
            self.threads is None or self.threads >= 1,
            f"runtime.threads must be at least 1, not {self.threads}.",
        )
        _at_least("runtime", "checkpoint_every", self.checkpoint_every, 0)
        _at_least("runtime", "log_every", self.log_every, 1)


@dataclass(frozen=True)
class RunConfig:
    """Everything that can change a loss of a run, and nothing else."""

    model: models.Config = field(default_factory=models.LlamaConfig)
    """The model; its key `architecture` says which, llama if not given."""
    data: DataConfig = field(default_factory=DataConfig)
    """The text and its batches."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """The optimizer and its hyperparameters."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """The learning rate over the run."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """Length, seed, numerics and evaluation."""

    def __post_init__(self) -> None:
        model, data, training = self.model, self.data, self.training
        _require(
            model.vocab_size == data.vocab_size,
            f"model.vocab_size is {model.vocab_size} and data.vocab_size is {data.vocab_size}; "
            "they must be equal.",
        )
        _require(
            data.sequence_length <= model.max_sequence_length,
            f"data.sequence_length is {data.sequence_length}, longer than "
            f"model.max_sequence_length, which is {model.max_sequence_length}.",
        )
        _require(
            data.batch_size % training.gradient_accumulation == 0,
            f"training.gradient_accumulation is {training.gradient_accumulation}, which does not "
            f"divide data.batch_size, which is {data.batch_size}.",
        )
        _require(
            self.schedule.warmup_steps < training.steps,
            f"schedule.warmup_steps is {self.schedule.warmup_steps}; it must be less than "
            f"training.steps, which is {training.steps}.",
        )

    @property
    def tokens_per_step(self) -> int:
        """Training tokens per optimizer step."""
        return self.data.batch_size * self.data.sequence_length

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "config") -> RunConfig:
        """Build from nested dictionaries; `source` names them in error messages.

        Raises UserError for an unknown key, a wrong type or a value out of range.
        """
        return parsing.read(cls, values, source)

    @classmethod
    def from_toml(cls, path: Path) -> RunConfig:
        """Read a TOML file; sections and keys that it does not give keep their defaults.

        Raises UserError if the file is missing, is not TOML, or does not describe a run.
        """
        return cls.from_dict(parsing.load_toml(path), source=str(path))

    def to_dict(self) -> dict[str, Any]:
        """Return all fields, defaults included, as nested dictionaries of plain values."""
        return parsing.to_dict(self)

    def to_toml(self) -> str:
        """Return the TOML text that `from_toml` reads back to an equal config."""
        return parsing.dump_toml(self.to_dict())

    def hash(self) -> str:
        """Return the run's identity, 12 hexadecimal digits over everything that can change a loss.

        Content counts, not place: a corpus enters by its fingerprint and an optimizer's file by its
        digest. Raises ValueError if these are not known yet (see `steepest.train.resolve`).
        """
        return identity.config_hash(self.to_dict())
