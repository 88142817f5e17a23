"""`steepest train`."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path

from rich.console import Console
from tyro.conf import Positional

from steepest import models, train
from steepest.cli.arguments import parse
from steepest.report import live


@dataclass(frozen=True)
class Train:
    """Train one model: config from a TOML file, flags on top."""

    config: Positional[Path | None] = None
    """TOML file with the sections below; what it leaves out keeps its default."""
    model: models.LlamaConfig = field(default_factory=models.LlamaConfig)
    data: train.DataConfig = field(default_factory=train.DataConfig)
    optimizer: train.OptimizerConfig = field(default_factory=train.OptimizerConfig)
    schedule: train.ScheduleConfig = field(default_factory=train.ScheduleConfig)
    training: train.TrainingConfig = field(default_factory=train.TrainingConfig)
    runtime: train.Runtime = field(default_factory=train.Runtime)
    out: Path = Path("results/runs")
    """Directory of runs; this one goes to <out>/<hash>."""


def train_one(arguments: list[str]) -> None:
    """Train one run and print its result."""
    args: Train = parse(Train, "train", arguments)
    if args.config is not None:  # again, with what the file says as the defaults of the flags
        config = train.RunConfig.from_toml(args.config)
        sections = {f.name: getattr(config, f.name) for f in fields(config)}
        args = parse(Train, "train", arguments, Train(config=args.config, **sections))
    sections = {f.name: getattr(args, f.name) for f in fields(train.RunConfig)}
    console = Console()
    with live.LiveRun(console) as watcher:
        result = train.run(
            train.RunConfig(**sections), args.out, runtime=args.runtime, on_progress=watcher
        )
    console.print(
        f"{result['optimizer']} {result['status']}: "
        + (result["reason"] or f"validation loss {result['val_loss']:.4f} nats per token")
        + f", {result['tokens_per_second']:,.0f} tokens/s, {args.out / result['hash']}",
        highlight=False,
        soft_wrap=True,
    )
