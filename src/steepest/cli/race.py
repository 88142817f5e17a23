"""`steepest race` and `steepest report`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from tyro.conf import Positional

from steepest import compiler, models, train
from steepest.cli.arguments import parse
from steepest.cores import cores
from steepest.errors import UserError
from steepest.report import formatting, html, live, terminal
from steepest.study import estimate, store
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
    """Learning rate after a tenth of the steps of warmup: down to 0, over the last fifth for wsd,
    or constant. `steepest train` has more schedules, and all of their settings."""
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
    jobs: int = field(default_factory=cores)
    """Runs side by side, one thread each; by default as many as there are cores."""
    out: Path | None = None
    """Directory of the race; by default results/race-<protocol>, so that equal protocols meet."""


@dataclass(frozen=True)
class Report:
    """Write the report of a race again, and print its leaderboard."""

    race: Positional[Path]
    """Directory of the race (the one that holds race.json)."""
    output: Path | None = None
    """HTML file; by default report.html in the directory of the race."""


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
    for name in ("tokens", "batch_size", "sequence_length", "seeds", "jobs"):
        if (value := getattr(args, name)) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {value}.")
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
        f"{len(plan.entrants)} optimizers on {plan.model}, a {plan.base.model.architecture} of "
        f"{formatting.count(size)} parameters, {formatting.count(tokens)} tokens of "
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


def report(arguments: list[str]) -> None:
    """Write a race's report and print its leaderboard."""
    args: Report = parse(Report, "report", arguments)
    found = store.load_race(args.race)
    path = args.output or args.race / "report.html"
    html.write(found, path)
    console = Console()
    console.print(terminal.summary(found))
    console.print(f"\nReport: {path}", soft_wrap=True)
