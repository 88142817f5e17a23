"""The command line: one sub-command per verb.

A sub-command is a frozen dataclass of its arguments, whose fields are its flags and whose field
docstrings are its help, and a function that does it.
"""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from steepest.errors import UserError, unknown

try:
    import tyro
    from rich.console import Console
    from rich.table import Table
    from tyro.conf import Positional
except ImportError as error:
    sys.exit(f"steepest: the command line needs {error.name}; pip install 'steepest[bench]'.")

from steepest import compiler, models, train
from steepest.optim import catalogue
from steepest.optim.memory import held
from steepest.report import formatting, html, live, terminal
from steepest.report import optimizers as about
from steepest.study import estimate, executor, store
from steepest.study import plan as planning
from steepest.study.race import run_race


def _protocol(key: str) -> Any:
    return planning.defaults()["protocol"][key]


@dataclass(frozen=True)
class Race:
    """Race optimizers: tune each one's learning rate, rank them on fresh seeds, write a report."""

    optimizers: Positional[tuple[str, ...]] = ()
    """Names from `steepest optimizers`, or path/to/mine.py:Class for a torch.optim.Optimizer or
    steepest.Rule of your own. Without any, the seven of the default race."""
    model: str = field(default_factory=lambda: _protocol("model"))
    """Model size, one of `steepest models`."""
    corpus: str = field(default_factory=lambda: _protocol("corpus"))
    """Embedded corpus, or path of a .txt file or of a folder of .txt files."""
    vocab_size: int | None = None
    """Tokens of the tokenizer trained on the corpus; the model size's own if not given."""
    tokens: int = field(default_factory=lambda: _protocol("tokens"))
    """Training tokens of each run."""
    batch_size: int = field(default_factory=lambda: _protocol("batch_size"))
    """Sequences per step."""
    sequence_length: int = field(default_factory=lambda: _protocol("sequence_length"))
    """Tokens per sequence."""
    schedule: Literal["cosine", "linear", "wsd", "constant"] = field(
        default_factory=lambda: _protocol("schedule")
    )
    """Learning-rate schedule after warmup."""
    precision: Literal["float32", "bfloat16"] = field(
        default_factory=lambda: _protocol("precision")
    )
    """bfloat16 is autocast; weights and optimizer state are float32 either way."""
    compile: bool | None = None
    """Compile the model's training step; by default where a C++ compiler is found."""
    lrs: tuple[str, ...] = ()
    """Learning rates to try: numbers for every optimizer, or name=number,number for one. Those that
    the race in the same directory has tried count, too."""
    seeds: int = field(default_factory=lambda: _protocol("seeds"))
    """Final runs of each optimizer at its best learning rate."""
    baseline: str | None = None
    """Optimizer that the others are compared with; adamw where it races, else the first."""
    jobs: int = field(default_factory=executor.cores)
    """Runs side by side, one thread each; by default as many as there are cores."""
    out: Path | None = None
    """Directory of the race; by default results/race-<protocol>, so that equal protocols meet."""


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


@dataclass(frozen=True)
class Report:
    """Write the report of a race again, and print its leaderboard."""

    race: Positional[Path]
    """Directory of the race (the one that holds race.json)."""
    output: Path | None = None
    """HTML file; by default report.html in the directory of the race."""


@dataclass(frozen=True)
class Optimizers:
    """List the optimizers, or show one in detail."""

    name: Positional[str | None] = None
    """Optimizer to show."""


@dataclass(frozen=True)
class Memory:
    """Show what weights, gradients and optimizer state take, without allocating them.

    Hyperparameters that decide the state are flags, too: --rank 256.
    """

    model: str = "llama-350m"
    """Model size, one of `steepest models`."""
    optimizer: tuple[str, ...] = ()
    """Names from `steepest optimizers`; one is shown role by role. Without any, all of them."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of weights and gradients."""
    state_dtype: Literal["float32", "bfloat16"] | None = None
    """Count floating-point state as if it were kept in this dtype; steepest keeps float32."""


@dataclass(frozen=True)
class Models:
    """List the model sizes."""


def main() -> None:
    """Run the command line: print the error and exit with 2 for input that cannot work."""
    arguments = sys.argv[1:]
    try:
        if not arguments or arguments[0] in ("-h", "--help"):
            overview()
            return
        name, *rest = arguments
        if name not in COMMANDS:
            raise unknown("command", name, COMMANDS)
        COMMANDS[name][1](rest)
    except UserError as error:
        print(f"steepest: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("steepest: stopped; the same command continues where this one was.", file=sys.stderr)
        sys.exit(130)


def overview() -> None:
    """Print what there is."""
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, (arguments, _) in COMMANDS.items():
        table.add_row(f"  steepest {name}", (arguments.__doc__ or "").strip())
    console = Console()
    console.print("Which optimizer trains language models best?\n")
    console.print(table)
    console.print("\nEach has --help.")


def parse(kind: type[Any], name: str, arguments: list[str], default: Any = None) -> Any:
    """Return the arguments of a sub-command; an unknown flag is an error with the nearest one."""
    flags = [f"--{flag}" for flag in flags_of(kind)]
    for word in arguments:
        flag = word.partition("=")[0].replace("_", "-")
        if flag.startswith("--") and flag not in (*flags, "--help"):
            raise unknown("flag", flag, flags)
    given = {} if default is None else {"default": default}
    parsed, rest = tyro.cli(
        kind,
        args=arguments,
        prog=f"steepest {name}",
        description=kind.__doc__,
        return_unknown_args=True,
        config=(tyro.conf.FlagConversionOff,),
        **given,
    )
    if rest:
        raise UserError(f"steepest {name} has no place for {rest[0]!r}; see --help.")
    return parsed


def flags_of(kind: type[Any], prefix: str = "") -> list[str]:
    """Return the flags of a sub-command without their dashes, those of its sections with dots."""
    flags = []
    for part in fields(kind):
        nested = part.default_factory if isinstance(part.default_factory, type) else None
        if nested is not None and is_dataclass(nested):
            flags += flags_of(nested, f"{prefix}{part.name}.")
        elif "Positional[" not in str(part.type):
            flags.append(f"{prefix}{part.name}".replace("_", "-"))
    return flags


def race(arguments: list[str]) -> None:
    """Run a race and show what came out."""
    args: Race = parse(Race, "race", arguments)
    plan = plan_of(args)
    out = args.out or Path("results") / f"race-{plan.key()}"
    console = Console()
    announce(console, plan, out, args.jobs)
    with live.LiveRace(console, runs=plan.runs, steps=plan.base.training.steps) as watcher:
        run_race(plan, out, jobs=args.jobs, watcher=watcher)
    finished = store.load_race(out)
    html.write(finished, out / "report.html")
    console.print()
    console.print(terminal.summary(finished))
    console.print(f"\nReport: {out / 'report.html'}", soft_wrap=True)


def plan_of(args: Race) -> planning.RacePlan:
    """Return the race that the flags describe."""
    names = args.optimizers or tuple(_protocol("optimizers"))
    if repeated := planning.duplicates(names):
        raise UserError(f"{repeated[0]} is named twice.")
    if args.seeds < 1 or args.jobs < 1 or args.tokens < 1:
        raise UserError("--seeds, --jobs and --tokens must be at least 1.")
    lrs = planning.grids(args.lrs, names)
    base = planning.base_config(
        model=args.model,
        corpus=args.corpus,
        vocab_size=args.vocab_size,
        tokens=args.tokens,
        batch_size=args.batch_size,
        sequence_length=args.sequence_length,
        schedule=args.schedule,
        precision=args.precision,
        compile=args.compile,
    )
    entrants = tuple(planning.entrant(name, lrs[name]) for name in names)
    for entrant in entrants:  # what cannot be built is said now, not by the first worker
        optimizer = train.OptimizerConfig(entrant.name, entrant.lrs[0], entrant.options)
        train.check(optimizer, base.model)
    return planning.RacePlan(entrants, base, args.seeds, args.baseline, args.model)


def announce(console: Console, plan: planning.RacePlan, out: Path, jobs: int) -> None:
    """Print what is about to be done, with an estimate of its time."""
    training, tokens = plan.base.training, plan.base.training.steps * plan.base.tokens_per_step
    size = models.parameter_count(plan.base.model).total
    console.print(
        f"{len(plan.entrants)} optimizers on a LLaMA of {formatting.count(size)} "
        f"parameters ({plan.model}), {formatting.count(tokens)} tokens of "
        f"{plan.base.data.corpus} a run in {training.steps} steps.",
        highlight=False,
    )
    table = Table("optimizer", "learning rates to try", box=None, pad_edge=False)
    for entrant in plan.entrants:
        table.add_row(entrant.name, "  ".join(f"{lr:g}" for lr in entrant.lrs))
    console.print(table)
    if compiler.problem() and not training.compile:
        console.print(f"{compiler.problem()} Everything runs eagerly, slower.", highlight=False)
    seconds = estimate.race_seconds(plan, jobs)
    console.print(
        f"Then the best of each on {plan.seeds} fresh seeds: {plan.runs} runs, {jobs} at a time, "
        f"about {formatting.duration(seconds)}. Results: {out}\n",
        highlight=False,
        soft_wrap=True,
    )


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


def report(arguments: list[str]) -> None:
    """Write a race's report and print its leaderboard."""
    args: Report = parse(Report, "report", arguments)
    found = store.load_race(args.race)
    path = args.output or args.race / "report.html"
    html.write(found, path)
    console = Console()
    console.print(terminal.summary(found))
    console.print(f"\nReport: {path}", soft_wrap=True)


def optimizers(arguments: list[str]) -> None:
    """List the optimizers or show one."""
    args: Optimizers = parse(Optimizers, "optimizers", arguments)
    console = Console()
    if args.name is None:
        console.print(about.listing())
        console.print(
            "\nState is that of a 256 x 128 float32 matrix. In detail: steepest optimizers NAME"
        )
        return
    for part in about.detail(args.name):
        console.print(part, highlight=False)


def memory(arguments: list[str]) -> None:
    """Print what weights, gradients and optimizer state take."""
    arguments, given = hyperparameters_in(arguments, flags_of(Memory))
    args: Memory = parse(Memory, "memory", arguments)
    names = args.optimizer or tuple(
        name
        for name in catalogue.names()
        if given.keys() <= catalogue.recipe(name).hyperparameters().keys()
    )
    with torch.device("meta"):
        model = models.Llama(models.size(args.model))
    dtype = getattr(torch, args.dtype)
    state_dtype = None if args.state_dtype is None else getattr(torch, args.state_dtype)
    try:
        rows = [
            (name, held(name, model, dtype=dtype, state_dtype=state_dtype, **given))
            for name in names
        ]
    except TypeError as error:  # an unknown hyperparameter
        raise UserError(str(error)) from None
    console = Console()
    if len(rows) == 1:
        console.print(about.memory_by_role(rows[0][1]))
    else:
        console.print(about.memory_by_optimizer(rows))
    console.print("\nGB is 1e9 bytes. Activations and buffers of the backward pass are not in it.")


def hyperparameters_in(arguments: list[str], flags: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Return the arguments without `--rank 256` and its like, and those as hyperparameters.

    What is not a flag of the command but a hyperparameter of some optimizer counts as one; its
    value is read as TOML.
    """
    known = {key for name in catalogue.names() for key in catalogue.recipe(name).hyperparameters()}
    rest, given = [], {}
    words = iter(arguments)
    for word in words:
        name, equals, value = word.removeprefix("--").partition("=")
        key = name.replace("-", "_")
        if not word.startswith("--") or name.replace("_", "-") in flags or key not in known:
            rest.append(word)
            continue
        text = value if equals else next(words, "")
        if not text or text.startswith("--"):
            raise UserError(f"{word} needs a value, as in {word} 4 or {word} true.")
        try:
            read = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            read = text
        given[key] = tuple(read) if isinstance(read, list) else read
    return rest, given


def list_models(arguments: list[str]) -> None:
    """List the model sizes."""
    parse(Models, "models", arguments)
    table = Table("name", "parameters", "layers", "hidden", "heads", "vocabulary", box=None)
    for name, config in models.sizes().items():
        total = formatting.count(models.parameter_count(config).total)
        numbers = (config.layers, config.hidden_size, config.heads, config.vocab_size)
        table.add_row(name, total, *map(str, numbers))
    Console().print(table)


COMMANDS: dict[str, tuple[type[Any], Callable[[list[str]], None]]] = {
    "race": (Race, race),
    "train": (Train, train_one),
    "report": (Report, report),
    "optimizers": (Optimizers, optimizers),
    "memory": (Memory, memory),
    "models": (Models, list_models),
}


if __name__ == "__main__":
    main()
