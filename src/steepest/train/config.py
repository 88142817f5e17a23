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

import steepest
from steepest import models
from steepest.data import Packing
from steepest.errors import UserError
from steepest.train import identity, parsing
from steepest.train.averaging import AveragingConfig
from steepest.train.batch_size import BatchConfig
from steepest.train.precision import Precision
from steepest.train.schedules import ScheduleConfig
from steepest.train.sinks import SinkName

Option = bool | int | float | str | list[bool] | list[int] | list[float] | list[str]

NOT_GIVEN = math.nan
OWN_CLASS_LR = 1e-3
"""Learning rate of a class of one's own for which none is given: that of torch.optim's AdamW."""


def _require(condition: bool, sentence: str) -> None:
    if not condition:
        raise UserError(sentence)


def _require_usable(key: str, value: Any) -> None:
    """Raise UserError for numbers that no tensor holds and text that no file can be called."""
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, float):
            _require(math.isfinite(item), f"{key} must be a finite number, not {item}.")
        elif isinstance(item, int):
            _require(abs(item) < 2**63, f"{key} must be below 2^63, not {item}.")
        elif isinstance(item, str):
            unicode = item.encode(errors="ignore").decode()  # without halves of surrogate pairs
            _require(
                unicode == item and "\0" not in item,
                f"{key} must be Unicode text without NUL, not {item!r}.",
            )


def _at_least(section: str, name: str, value: int, least: int) -> None:
    _require(value >= least, f"{section}.{name} must be at least {least}, not {value}.")


@dataclass(frozen=True)
class DataConfig:
    """The text, its tokens and how they are cut into batches."""

    corpus: str = "sotu"
    """Folder that `steepest data prepare` wrote; or, to be tokenized by the run, the name of an
    embedded corpus, a .txt file or a folder of .txt files."""
    vocab_size: int = 1024
    """Number of tokens of the tokenizer: of the folder's, or of one trained on the corpus. The
    model's may be larger."""
    sequence_length: int = 128
    """Tokens per sequence."""
    packing: Literal["contiguous", "documents", "rows"] = "contiguous"
    """contiguous windows over all documents; documents, in the same windows, that do not see each
    other; or one document per row, cut or padded."""
    context: int | None = None
    """Longest piece of a document whose tokens see each other, with packing documents."""
    batch_size: int = 16
    """Sequences per optimizer step, over all gradient accumulation steps."""
    fingerprint: str = ""
    """Content hash of texts, tokenizer and split. Filled in by the run; if given, it is checked."""

    def __post_init__(self) -> None:
        _require(bool(self.corpus), "data.corpus must name a corpus or a path, and is empty.")
        _at_least("data", "vocab_size", self.vocab_size, 2)
        _at_least("data", "sequence_length", self.sequence_length, 1)
        _at_least("data", "batch_size", self.batch_size, 1)
        self.as_packing()

    def as_packing(self) -> Packing:
        """Return how documents become rows."""
        return Packing(self.packing, self.context)


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer and its own hyperparameters."""

    name: str = "adamw"
    """Name in the catalogue, or "path/to/file.py:Class", or "package.module:Class"."""
    lr: float = NOT_GIVEN
    """Peak learning rate; if not given, the optimizer's default in the catalogue, 1e-3 of a class
    of one's own."""
    options: dict[str, Option] = field(default_factory=dict)
    """The optimizer's other hyperparameters, by the names its constructor has for them."""
    wrap: tuple[str, ...] = ()
    """Wrappers around an optimizer of the catalogue, innermost first: cautious, lookahead, ..."""
    source_sha256: str = ""
    """Content hash of the file of a class given by path or module. Filled in; if given, checked."""

    def __post_init__(self) -> None:
        _require(bool(self.name), "optimizer.name must name an optimizer, and is empty.")
        if self.lr is NOT_GIVEN:  # another NaN is an error
            object.__setattr__(self, "lr", default_lr(self.name))
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


def default_lr(name: str) -> float:
    """Return the learning rate of an optimizer for which none is given.

    Raises UserError for a name that is not in the catalogue and is no class of one's own.
    """
    if identity.is_class(name):
        return OWN_CLASS_LR
    lr: float = steepest.describe(name).hyperparameters["lr"][0]
    return lr


@dataclass(frozen=True)
class TrainingConfig:
    """Length, seed and numerics of the run."""

    steps: int = 600
    """Number of optimizer steps."""
    seed: int = 0
    """Seed of the initial weights and the order of the batches; validation is the same for all."""
    gradient_accumulation: int = 1
    """Equal parts that a batch is split into to save memory; divides data.batch_size."""
    clip_norm: float = 1.0
    """Largest global gradient norm; larger gradients are scaled down to it. 0 means no clipping."""
    z_loss: float = 0.0
    """Coefficient of the mean square of log Z in the loss (1e-4 in PaLM); 0 leaves it out."""
    precision: Precision = "auto"
    """bfloat16 is autocast over float32 weights; the pure ones keep weights in bfloat16, and round
    updates to nearest, stochastically, or with Kahan's compensation. auto is bfloat16 on a GPU and
    float32 on a CPU, and the run's config says which it was."""
    tf32: bool = False
    """Let GPUs round the inputs of float32 products to TF32, which has 10 bits behind the point."""
    compile: bool = False
    """Compile the model's forward and backward pass with torch.compile."""
    nonfinite: Literal["propagate", "skip"] = "propagate"
    """What a gradient that is not finite does: reach the weights, or have the step left out and
    counted (which on a GPU waits for every gradient)."""
    recompute_activations: bool = False
    """Keep only the inputs of layers for the backward pass, which computes the rest again."""

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
        _require(
            math.isfinite(self.z_loss) and self.z_loss >= 0,
            f"training.z_loss must be 0 (off) or a positive number, not {self.z_loss}.",
        )


@dataclass(frozen=True)
class EvaluationConfig:
    """When and on what the run is evaluated."""

    every: int = 60
    """Steps between evaluations; there is one before the first step and after the last, too."""
    at: tuple[int, ...] = ()
    """Further steps with an evaluation."""
    tokens: int = 32_768
    """Held-out tokens per evaluation, the same ones every time; at most the whole held-out set."""
    train_tokens: int = 0
    """Training tokens evaluated beside them; 0 for none."""

    def __post_init__(self) -> None:
        _at_least("evaluation", "every", self.every, 1)
        _at_least("evaluation", "tokens", self.tokens, 1)
        _at_least("evaluation", "train_tokens", self.train_tokens, 0)
        for step in self.at:
            _at_least("evaluation", "at", step, 1)


@dataclass(frozen=True)
class Runtime:
    """Where and how a run executes. None of it is part of the run's identity."""

    device: str = "cpu"
    """Device to train on: cpu, cuda or cuda:N."""
    threads: int | None = None
    """CPU threads of torch; torch's own choice if not given. 1 makes CPU runs equal to the bit."""
    checkpoint_every: int = 100
    """Steps between checkpoints; 0 keeps none, and a killed run then starts again."""
    keep_checkpoints: int = 2
    """Newest checkpoints that are kept; the last one alone once the run is complete."""
    permanent_every: int = 0
    """Steps between checkpoints that are kept for good; 0 keeps none."""
    log_every: int = 10
    """Steps between training records in metrics.jsonl; each copies the weights for its step."""
    dynamics_every: int = 0
    """Steps between records in dynamics.jsonl of norms, angles and spectra of every tensor; 0 for
    none."""
    sinks: tuple[SinkName, ...] = ()
    """Where metrics also go as they come: tensorboard, wandb, trackio."""
    processes: int = 1
    """Processes on each machine, one per GPU or group of cores; not where torchrun starts them."""
    nodes: int = 1
    """Machines that the run is on; the same command is given on each. Slurm's srun says it, too."""
    node_rank: int = 0
    """Number of this machine, from 0."""
    rendezvous: str = ""
    """host:port of machine 0, at which the machines meet; the port must be free there."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """What several processes hold: a replica of the model each (ddp), or a part of it (fsdp)."""

    def __post_init__(self) -> None:
        _require(
            self.threads is None or self.threads >= 1,
            f"runtime.threads must be at least 1, not {self.threads}.",
        )
        _at_least("runtime", "checkpoint_every", self.checkpoint_every, 0)
        _at_least("runtime", "keep_checkpoints", self.keep_checkpoints, 1)
        _at_least("runtime", "permanent_every", self.permanent_every, 0)
        _require(
            self.permanent_every % (self.checkpoint_every or math.inf) == 0,
            f"runtime.permanent_every is {self.permanent_every}; it must be a multiple of "
            f"runtime.checkpoint_every, which is {self.checkpoint_every}: it says which of those "
            "checkpoints stay.",
        )
        _at_least("runtime", "processes", self.processes, 1)
        _at_least("runtime", "nodes", self.nodes, 1)
        _require(
            0 <= self.node_rank < self.nodes,
            f"runtime.node_rank must be from 0 to {self.nodes - 1}, not {self.node_rank}.",
        )
        _require(
            self.nodes == 1 or ":" in self.rendezvous,
            "runtime.nodes needs runtime.rendezvous, host:port of machine 0.",
        )
        _at_least("runtime", "log_every", self.log_every, 1)
        _at_least("runtime", "dynamics_every", self.dynamics_every, 0)


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
    """Learning rate and weight decay over the run."""
    batch: BatchConfig = field(default_factory=BatchConfig)
    """The batch size over the run."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """Length, seed and numerics."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """When and on what it is evaluated."""
    averaging: AveragingConfig = field(default_factory=AveragingConfig)
    """Averages of the weights that are evaluated beside them."""

    def __post_init__(self) -> None:
        model, data, training = self.model, self.data, self.training
        for key, value in identity.flat(self.to_dict()).items():
            _require_usable(key, value)
        _require(
            model.layers <= 10_000, f"model.layers must be at most 10,000, not {model.layers}."
        )
        _require(
            model.vocab_size >= data.vocab_size,
            f"model.vocab_size is {model.vocab_size}, smaller than data.vocab_size, which is "
            f"{data.vocab_size}; set model.vocab_size to {data.vocab_size} or more.",
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
        self.schedule.check(training.steps)
        self.batch.check(data.batch_size, training.gradient_accumulation, training.steps)
        if self.batch.schedule == "ramp":  # takes more steps than training.steps
            return
        self.averaging.check(training.steps)
        late = [step for step in self.evaluation.at if step > training.steps]
        _require(
            not late,
            f"evaluation.at has step {max(late, default=0)}, beyond training.steps, which is "
            f"{training.steps}.",
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
