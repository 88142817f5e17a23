"""`steepest train`."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field, fields, make_dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tyro.conf import Positional

from steepest import models, train
from steepest.cli.arguments import parse, value_of
from steepest.data.shards import Index, is_prepared
from steepest.optim.presets import preset
from steepest.report import live
from steepest.train.folder import RunFolder, check_resumes
from steepest.train.processes import run_together
from steepest.train.resolving import open_data


@dataclass(frozen=True)
class Train:
    """Train one model: config from a TOML file, flags on top.

    A run that was stopped continues with the same command, or with --resume and its folder.
    Shorter: --model NAME is a size of `steepest models` (its fields are flags, too), --data a
    corpus or prepared folder (which brings data.vocab_size), --optimizer a name of
    `steepest optimizers`, --preset one of its tuned settings. --dynamics K measures weights,
    gradients and updates every K steps.
    """

    config: Positional[Path | None] = None
    """TOML file with the sections below; what it leaves out keeps its default."""
    model: models.LlamaConfig = field(default_factory=models.LlamaConfig)
    data: train.DataConfig = field(default_factory=train.DataConfig)
    optimizer: train.OptimizerConfig = field(default_factory=train.OptimizerConfig)
    schedule: train.ScheduleConfig = field(default_factory=train.ScheduleConfig)
    batch: train.BatchConfig = field(default_factory=train.BatchConfig)
    training: train.TrainingConfig = field(default_factory=train.TrainingConfig)
    evaluation: train.EvaluationConfig = field(default_factory=train.EvaluationConfig)
    averaging: train.AveragingConfig = field(default_factory=train.AveragingConfig)
    runtime: train.Runtime = field(default_factory=train.Runtime)
    out: Path = Path("results/runs")
    """Directory of runs; this one goes to <out>/<hash>. With --resume it is that of the folder."""
    resume: Path | None = None
    """Folder of a run to continue. Its config is the base here; what a TOML file or flags change in
    it is refused by name. Flags of runtime can be others."""


def train_one(arguments: list[str]) -> None:
    """Train one run and print its result.

    Exits with 75 (`train.REQUEUE`) where it was asked to stop and saved, by SIGTERM or SIGUSR1.
    """
    config, args = read(arguments)
    if args.resume is not None:
        config = _resumed(config, args)
    if args.runtime.processes > 1 and "WORLD_SIZE" not in os.environ:
        sys.exit(_start_processes(config, args, arguments))
    out = args.out if args.resume is None else args.resume.resolve().parent
    console = Console(quiet=os.environ.get("RANK", "0") != "0")
    stop = train.StopRequest()
    try:
        with live.LiveRun(console) as watcher, stop.listening():
            result = train.run(config, out, runtime=args.runtime, on_progress=watcher, stop=stop)
    except train.Preempted as told:
        print(f"steepest: {told}", file=sys.stderr)
        sys.exit(train.REQUEUE)
    console.print(
        f"{result['optimizer']} {result['status']}: "
        + (result["reason"] or f"validation loss {result['val_loss']:.4f} nats per token")
        + f", {result['tokens_per_second']:,.0f} tokens/s, {out / result['hash']}",
        highlight=False,
        soft_wrap=True,
    )


def _start_processes(config: train.RunConfig, args: Any, arguments: list[str]) -> int:
    """Run this command in several processes here; return the exit code.

    What the processes would refuse is refused before there are any.
    """
    train.check_batch(config.data.batch_size, args.runtime.processes)
    train.check(config.optimizer, config.model)
    command = [sys.executable, "-m", "steepest", "train", *arguments]
    return run_together(command, args.runtime.processes)


def _resumed(config: train.RunConfig, args: Any) -> train.RunConfig:
    """Return the config that continues the run in a folder.

    Raises UserError where the arguments describe another one.
    """
    folder = RunFolder(args.resume)
    there = train.RunConfig.from_toml(folder.config)
    if config.data.corpus != there.data.corpus:  # so that its content is found to be another
        config = replace(config, data=replace(config.data, fingerprint=""))
    config = train.resolve(config, open_data(config.data), torch.device(args.runtime.device))
    check_resumes(folder, config)
    return config


def read(
    arguments: list[str], command: str = "train", kind: type[Train] = Train
) -> tuple[train.RunConfig, Any]:
    """Return the run that the arguments of a command describe, and the arguments.

    What the file says is the default of the short flags, and those of the others.
    """
    arguments, short = _short_flags(arguments)
    file = next((Path(word) for word in arguments if word.endswith(".toml")), None)
    if file is None and (resume := value_of("--resume", list(arguments))) is not None:
        file = RunFolder(Path(resume)).config
    base = train.RunConfig() if file is None else train.RunConfig.from_toml(file)
    sections = {f.name: getattr(base, f.name) for f in fields(base)}
    sections.update(_shortened(sections, short))
    kind = _arguments_for(type(sections["model"]), kind)
    args = parse(kind, command, arguments, kind(**sections))
    return train.RunConfig(**{name: getattr(args, name) for name in sections}), args


def _short_flags(arguments: list[str]) -> tuple[list[str], dict[str, str]]:
    """Return the arguments without the short flags, and those that are of the run's config."""
    rest, short = list(arguments), {}
    if (steps := value_of("--dynamics", rest)) is not None:
        rest += ["--runtime.dynamics-every", steps]
    for name in ("model", "data", "optimizer", "preset"):
        if (value := value_of(f"--{name}", rest)) is not None:
            short[name] = value
    return rest, short


def _shortened(sections: dict[str, Any], short: dict[str, str]) -> dict[str, Any]:
    """Return the sections that short flags change."""
    changed = {}
    data = sections["data"]
    if "model" in short:
        model = changed["model"] = models.size(short["model"])
        data = replace(data, vocab_size=model.vocab_size)
    if "data" in short:
        data = replace(data, corpus=short["data"])
        folder = Path(data.corpus).expanduser()
        if is_prepared(folder):
            data = replace(data, vocab_size=Index.read(folder).recipe.vocab_size)
    optimizer = sections["optimizer"]
    if "optimizer" in short:
        optimizer = train.OptimizerConfig(short["optimizer"])
    if "preset" in short:
        found = preset(optimizer.name, short["preset"])
        values = {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in found.hyperparameters.items()
        }
        lr = values.pop("lr", optimizer.lr)
        optimizer = replace(optimizer, lr=lr, options=values, wrap=found.wrap)
    return {**changed, "data": data, "optimizer": optimizer}


def _arguments_for(model: type[Any], kind: type[Train]) -> type[Any]:
    """Return a command's arguments with the flags of the model's architecture."""
    if model is models.LlamaConfig:
        return kind
    made = make_dataclass(
        kind.__name__, [("model", model, field(default_factory=model))], bases=(kind,), frozen=True
    )
    made.__doc__ = kind.__doc__
    return made
