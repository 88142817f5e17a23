"""`steepest train`.

`train_one` either trains, by `steepest.train.run`, or is the command on a machine for which several
processes are to be started: `train.processes.run_together` starts the same command in each, where
`train_one` then trains; their group is in the environment, and `train.group` how they meet in it.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field, fields, make_dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from tyro.conf import Positional

from steepest import models, train
from steepest.cli.arguments import parse, value_of, wants_help
from steepest.cli.commands import INTERRUPTED
from steepest.data.shards import Index, is_prepared
from steepest.errors import UserError
from steepest.optim.presets import preset
from steepest.report import live
from steepest.report.formatting import significant
from steepest.train import parsing
from steepest.train.folder import RunFolder, check_resumes
from steepest.train.group import meet, one_voice, wait_for_all
from steepest.train.processes import LAUNCHER, check_started, place_of, run_together
from steepest.train.resolving import open_data
from steepest.train.running import device_called
from steepest.train.stopping import stop_without


@dataclass(frozen=True)
class Train:
    """Train one model: config from a TOML file, flags on top.

        steepest train --model llama-60m --data DIR --optimizer muon --preset NAME
        steepest train run.toml --optimizer.lr 2e-3 --training.steps 2000

    --model NAME        a size of `steepest models`; its fields are flags, too
    --data PATH         a folder that `steepest data prepare` wrote, or text, and its vocabulary
    --optimizer NAME    one of `steepest optimizers`
    --preset NAME       tuned hyperparameters, which `steepest optimizers NAME` lists
    --dynamics K        measure weights, gradients and updates every K steps

    What most runs set, further down: --optimizer.lr, --optimizer.options, --training.steps,
    --training.seed, --data.batch-size, --data.sequence-length, --schedule.name,
    --schedule.warmup-steps, --evaluation.every, --runtime.device.

    A run that was stopped continues with the same command, or with --resume and its folder.
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


@dataclass(frozen=True)
class _RuntimeAlone:
    runtime: train.Runtime = field(default_factory=train.Runtime)


def train_one(arguments: list[str]) -> None:
    """Train one run and print its result, here or in the processes that runtime asks for.

    Exits with 75 (`train.REQUEUE`) where it was asked to stop and saved, by SIGTERM or SIGUSR1.
    """
    if not wants_help(arguments) and (place := place_of(_runtime_in(arguments))) is not None:
        if place.nodes == 1:  # else the others wait for this machine: its processes tell them
            config, _ = _run_described_by(arguments)
            train.check_batch(config.data.batch_size, place.world_size)
            train.check(config.optimizer, config.model)
        command = [sys.executable, "-m", "steepest", "train", *arguments]
        if (code := run_together(command, place)) == INTERRUPTED:
            raise KeyboardInterrupt
        sys.exit(code)
    if LAUNCHER in os.environ:
        stop_without(int(os.environ[LAUNCHER]))
    first = os.environ.get("RANK", "0") == "0"
    try:
        _train_here(arguments, Console(quiet=not first))
    except train.Preempted as told:
        if first:
            print(f"steepest: {told}", file=sys.stderr)
        sys.exit(train.REQUEUE)
    except train.FailedElsewhere as failure:
        if failure.untold:
            print(f"steepest: {failure}", file=sys.stderr)
        sys.exit(failure.code)
    except KeyboardInterrupt:
        if first:
            raise
        sys.exit(INTERRUPTED)


def _train_here(arguments: list[str], console: Console) -> None:
    """Train in this process, which may be one of several, and print the result."""
    store = meet()
    with one_voice(store):
        config, args = _run_described_by(arguments)
        check_started(args.runtime)
        if store is not None:
            wait_for_all(store)
    out = args.out if args.resume is None else args.resume.resolve().parent
    stop = train.StopRequest()
    with live.LiveRun(console) as watcher, stop.listening():
        result = train.run(config, out, runtime=args.runtime, on_progress=watcher, stop=stop)
    console.print(_ending(result, out), highlight=False, soft_wrap=True)


def _ending(result: dict[str, Any], out: Path) -> str:
    """Return how a run ended, why or at what loss and speed, and where it is."""
    name, folder = f"{result['optimizer']} {result['status']}", out / result["hash"]
    if result["reason"]:
        return f"{name}: {result['reason']} {folder}"
    loss = f"validation loss {result['val_loss']:.4f} nats per token"
    if perplexity := result.get("val_perplexity"):  # runs of before have none
        loss += f", perplexity {significant(perplexity)}"
    return f"{name}: {loss}, {result['tokens_per_second']:,.0f} tokens/s, {folder}"


def _runtime_in(arguments: list[str]) -> train.Runtime:
    """Return what the flags of runtime say, before a file is read, which a machine may lack.

    Wrong ones are told by `read`, where all processes have met and one speaks for them.
    """
    words, is_runtime = [], False
    for word in _file_in(arguments)[0]:
        is_runtime = word.startswith("--runtime.") if word.startswith("--") else is_runtime
        words += [word] if is_runtime else []
    try:
        runtime: train.Runtime = parse(_RuntimeAlone, "train", words).runtime
    except UserError:
        return train.Runtime()
    return runtime


def _run_described_by(arguments: list[str]) -> tuple[train.RunConfig, Any]:
    """Return the run that the arguments describe, a new one or that of --resume, and them."""
    config, args = read(arguments)
    return (config if args.resume is None else _resumed(config, args)), args


def _resumed(config: train.RunConfig, args: Any) -> train.RunConfig:
    """Return the config that continues the run in a folder.

    Raises UserError where the arguments describe another one.
    """
    folder = RunFolder(args.resume)
    there = train.RunConfig.from_toml(folder.config)
    if config.data.corpus != there.data.corpus:  # so that its content is found to be another
        config = replace(config, data=replace(config.data, fingerprint=""))
    device = device_called(args.runtime.device)
    config = train.resolve(config, open_data(config.data), device)
    check_resumes(folder, config)
    return config


def read(
    arguments: list[str], command: str = "train", kind: type[Train] = Train
) -> tuple[train.RunConfig, Any]:
    """Return the run that the arguments of a command describe, and the arguments.

    What the file says is the default of the short flags, and those of the others.
    """
    arguments, short = _short_flags(arguments)
    arguments, file = _file_in(arguments)
    if file is None and (resume := value_of("--resume", list(arguments))) is not None:
        file = RunFolder(Path(resume)).config
    values = {} if file is None else parsing.load_toml(file)
    given = parsing.arguments_of(train.RunConfig, values, str(file))
    sections = {f.name: getattr(train.RunConfig(), f.name) for f in fields(train.RunConfig)} | given
    sections.update(_shortened(sections, short))
    kind = _arguments_for(type(sections["model"]), kind)
    args = parse(kind, command, arguments, kind(**sections))
    if args.config is not None:
        raise UserError(
            f"{command} takes one file, whose name ends in .toml, and has no use for {args.config}."
        )
    base, sections = sections, {name: getattr(args, name) for name in sections}
    sections["optimizer"] = _on_top(base["optimizer"], args.optimizer, arguments)
    if args.resume is None:
        own = args.model.vocab_size if "model" in short else None
        is_given = "vocab_size" in values.get("data", {})
        is_given = is_given or _has_flag("--data.vocab-size", arguments)
        sections["data"] = _with_vocabulary(args.data, is_given, own)
    return train.RunConfig(**sections), args


def _file_in(arguments: list[str]) -> tuple[list[str], Path | None]:
    """Return the arguments without the TOML file, which may stand behind any flag's values."""
    before = ""
    for index, word in enumerate(arguments):
        is_value = before.startswith("--") and "=" not in before
        if word.endswith(".toml") and not word.startswith("--") and not is_value:
            return arguments[:index] + arguments[index + 1 :], Path(word)
        before = word
    return arguments, None


def _on_top(
    base: train.OptimizerConfig, given: train.OptimizerConfig, arguments: list[str]
) -> train.OptimizerConfig:
    """Return the optimizer with the hyperparameters of the file or preset that no flag changes."""
    if given.name == base.name:
        return replace(given, options={**base.options, **given.options})
    if _has_flag("--optimizer.lr", arguments):
        return given
    return replace(given, lr=train.default_lr(given.name))


def _has_flag(flag: str, arguments: list[str]) -> bool:
    return flag in [word.partition("=")[0].replace("_", "-") for word in arguments]


def _with_vocabulary(
    data: train.DataConfig, is_given: bool, of_model: int | None
) -> train.DataConfig:
    """Return the data with the vocabulary of a prepared folder, or else that of --model.

    Raises UserError if another one than the folder's is given.
    """
    folder = Path(data.corpus).expanduser()
    if not is_prepared(folder):
        return data if is_given or of_model is None else replace(data, vocab_size=of_model)
    recipe = Index.read(folder).recipe
    if is_given and data.vocab_size != recipe.vocab_size:
        raise UserError(
            f"data.vocab_size is {data.vocab_size}, but the tokens in {folder} are of a vocabulary "
            f"of {recipe.vocab_size} ({recipe.tokenizer}); leave data.vocab_size out."
        )
    return replace(data, vocab_size=recipe.vocab_size)


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
    if "model" in short:
        changed["model"] = models.size(short["model"])
    if "data" in short:
        changed["data"] = replace(sections["data"], corpus=short["data"])
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
    return {**changed, "optimizer": optimizer}


def _arguments_for(model: type[Any], kind: type[Train]) -> type[Any]:
    """Return a command's arguments with the flags of the model's architecture."""
    if model is models.LlamaConfig:
        return kind
    made = make_dataclass(
        kind.__name__, [("model", model, field(default_factory=model))], bases=(kind,), frozen=True
    )
    made.__doc__ = kind.__doc__
    return made
