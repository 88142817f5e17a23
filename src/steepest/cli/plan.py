"""`steepest plan`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from steepest.cli.train import Train, read
from steepest.report import formatting
from steepest.train import RunConfig, measuring, planning
from steepest.train.measuring import Measurement
from steepest.train.running import find_device, own_torch_state

GPUS = (
    "NVIDIA GeForce RTX 4090",
    "NVIDIA A100-SXM4-80GB",
    "NVIDIA H100 80GB HBM3",
    "NVIDIA H200",
    "NVIDIA B200",
)


@dataclass(frozen=True)
class Plan(Train):
    """Show what a run would take: memory, time, energy. Arguments are those of steepest train.

    A few of its steps are timed on this machine, if it is large enough; nothing is written.
    """

    mfu: float = 0.4
    """Part of the peak that GPUs are taken to reach (model FLOPs utilisation)."""
    gpu: tuple[str, ...] = GPUS
    """GPUs to plan for, by their names or parts of them: H100, 4090."""


def plan_run(arguments: list[str]) -> None:
    """Print what a run would take."""
    config, args = read(arguments, "plan", Plan)
    device = find_device(args.runtime.device)
    gpus = planning.find_gpus(args.gpu)
    planning.check_mfu(args.mfu)
    plan = planning.plan(config)
    console, measured = Console(), None
    refused = measuring.refusal(config, plan, device)
    if not refused:
        with (
            console.status("Timing a few steps on this machine ..."),
            own_torch_state(config.training, device, args.runtime.threads),
        ):
            measured = measuring.measure(config, plan, device)
        plan = planning.with_state(plan, measured.state_bytes)
    estimates = [planning.on_gpu(plan, name, peak, args.mfu) for name, peak in gpus.items()]
    console.print(_counts(config, plan), highlight=False)
    console.print()
    console.print(_memory(plan))
    console.print()
    console.print(_costs(measured, estimates))
    console.print()
    notes = [refused] if measured is None else _of_measurement(measured, config, plan)
    for sentence in [*notes, *_notes(config, args, estimates)]:
        console.print(sentence, highlight=False)


def _counts(config: RunConfig, plan: planning.Plan) -> Table:
    """Return what the run is, a line per part of it."""
    count, data = formatting.count, config.data
    parameters = plan.parameters
    model = f"{config.model.architecture}, {count(parameters.total)} parameters"
    model += f", {count(parameters.non_embedding)} of them outside embeddings"
    if parameters.active != parameters.total:
        model += f", {count(parameters.active)} active for a token"
    training = f"{count(plan.tokens)} tokens, {_ratio(plan.tokens, parameters.total)} per parameter"
    if plan.epochs is not None:
        training += f", {formatting.significant(plan.epochs)} passes over the data"
    size = f"{plan.rows} × {data.sequence_length} tokens"
    steps = {
        "fixed": f"{plan.steps:,} of {size}",
        "ramp": f"{plan.steps:,} of up to {size}",
        "norm_test": f"at most {plan.steps:,}, of {size} or more",
    }[config.batch.schedule]
    if plan.part_rows != plan.rows:
        steps += f", in parts of {plan.part_rows} × {data.sequence_length}"
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_row("model", model)
    table.add_row("optimizer", _optimizer(config))
    table.add_row("training", training)
    table.add_row("steps", steps)
    table.add_row(
        "evaluation",
        f"{formatting.plural(plan.evaluations, 'time')}, at most {count(plan.evaluation_tokens)} "
        "tokens in all",
    )
    table.add_row(
        "FLOPs",
        f"{plan.training_flops:.3g} for training ({plan.flops_per_token:.3g} per token), "
        f"{plan.evaluation_flops:.3g} for evaluation",
    )
    return table


def _optimizer(config: RunConfig) -> str:
    optimizer = config.optimizer
    wrapped = f" in {formatting.listed(list(optimizer.wrap))}" if optimizer.wrap else ""
    numbers: str = config.training.precision
    if numbers == "auto":
        numbers = "float32 on a CPU, bfloat16 autocast on a GPU"
    return f"{optimizer.name}{wrapped}, lr {optimizer.lr:g}, {numbers}"


def _memory(plan: planning.Plan) -> Table:
    """Return the memory of a CPU and a GPU, by category."""
    table = Table("memory", box=None, pad_edge=False)
    for title in ("on a CPU", "on a GPU"):
        table.add_column(title, justify="right")
    both = (plan.memory, plan.gpu_memory)
    for title, values in (
        ("weights", [m.weights for m in both]),
        ("gradients", [m.gradients for m in both]),
        ("optimizer state", [m.optimizer_state for m in both]),
        ("averages of weights", [m.averages for m in both]),
        (f"activations of {plan.part_rows} rows", [m.activations for m in both]),
        ("all", [m.total for m in both]),
    ):
        if title != "averages of weights" or any(values):
            table.add_row(title, *map(_size, values))
    return table


def _costs(measured: Measurement | None, estimates: list[planning.GPUEstimate]) -> Table:
    """Return the time and energy here and on GPUs."""
    table = Table("one device", box=None, pad_edge=False)
    for title in ("memory", "fits", "time, at least", "energy"):
        table.add_column(title, justify="right")
    if measured is not None:
        table.add_row(
            "this machine, measured",
            _size(measured.memory_bytes),
            "yes" if measured.fits else "no",
            _duration(measured.seconds),
            _energy(measured.joules),
        )
    for e in estimates:
        fits = {None: "?", True: "yes", False: "no"}[e.fits]
        name = e.name.removeprefix("NVIDIA ")
        table.add_row(name, _size(e.memory_bytes), fits, _duration(e.seconds), _energy(e.joules))
    return table


def _of_measurement(measured: Measurement, config: RunConfig, plan: planning.Plan) -> Iterator[str]:
    """Yield what was measured here, in sentences."""
    steps = formatting.plural(measured.steps, "step")
    scaled = "" if measured.rows == plan.rows else f" and scaled to {plan.rows}"
    if measured.rows < plan.part_rows:
        scaled += ", which rather gives too long a time, as few rows at a time are slower"
    yield (
        f"This machine: {steps} of {formatting.plural(measured.rows, 'row')} timed{scaled}. "
        f"{_duration(measured.step_seconds)} per step, of which the optimizer takes "
        f"{_duration(measured.optimizer_seconds)}; "
        f"{formatting.significant(measured.tokens_per_second)} tokens per second."
    )
    if config.training.compile:
        yield "Its steps are timed without training.compile, which makes them faster."
    if measured.joules is None:
        yield "Its energy is unknown: no counter of it can be read."


def _notes(config: RunConfig, args: Plan, estimates: list[planning.GPUEstimate]) -> Iterator[str]:
    """Yield what the numbers rest on."""
    yield (
        f"GPUs: all FLOPs at {100 * args.mfu:g} % (--mfu) of the dense bfloat16 peak, which small "
        "models do not reach, and at board power; a run fits if it takes "
        f"{100 * planning.USABLE:g} % of the memory or less."
    )
    yield "FLOPs are the model's: what the optimizer does, and gradients it asks for, come on top."
    if config.training.recompute_activations:
        yield "training.recompute_activations repeats forward passes, a third more than the FLOPs."
    if config.training.precision == "float32":
        yield "With training.precision float32 a GPU holds this memory, but takes longer."
    if any(e.fits is False for e in estimates):
        yield (
            "Where it does not fit, more training.gradient_accumulation or "
            "training.recompute_activations saves activations."
        )
    yield (
        "Memory is counted on shapes, without sharding; activations are those of PyTorch's own "
        "operations. GB is 1e9 bytes."
    )
    if (processes := args.runtime.processes * args.runtime.nodes) > 1:
        yield (
            f"All of it is for one process that does everything, not for {processes}, which share "
            "rows and, with fsdp, memory."
        )


def _ratio(tokens: int, parameters: int) -> str:
    return formatting.significant(tokens / parameters)


def _size(size: float | None) -> str:
    """Return bytes in kB, MB or GB, which are powers of 1000."""
    if size is None:
        return "unknown"
    unit, of = next(((u, n) for u, n in (("GB", 1e9), ("MB", 1e6)) if size >= n), ("kB", 1e3))
    return f"{formatting.significant(size / of)} {unit}"


def _duration(seconds: float) -> str:
    """Return a time from milliseconds to days."""
    if seconds < 1:
        return f"{formatting.significant(1000 * seconds)} ms"
    if seconds < 48 * 3600:
        return formatting.duration(seconds)
    return f"{formatting.significant(seconds / 86_400)} days"


def _energy(joules: float | None) -> str:
    """Return an energy in Wh, kWh or MWh."""
    if joules is None:
        return "unknown"
    hours = joules / 3600
    for unit, size in (("MWh", 1e6), ("kWh", 1e3), ("Wh", 1.0)):
        if hours >= size:
            return f"{formatting.significant(hours / size)} {unit}"
    return f"{formatting.significant(1000 * hours)} mWh"
