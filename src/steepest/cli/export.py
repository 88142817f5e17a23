"""`steepest export`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from tyro.conf import Positional

from steepest.cli.arguments import parse
from steepest.train import trained
from steepest.train.export import Dtype, export


@dataclass(frozen=True)
class Export:
    """Write a trained model as a folder that Hugging Face's AutoModelForCausalLM loads."""

    checkpoint: Positional[Path]
    """File of a checkpoint, or folder of a run, of which the newest is taken."""
    out: Path
    """Folder to write."""
    weights: trained.Kind = "evaluation"
    """evaluation: those that the run evaluates, averages where the optimizer has such; or those in
    training."""
    dtype: Dtype = "float32"
    """Of the weights."""


def export_model(arguments: list[str]) -> None:
    """Export a model and say what it is."""
    args: Export = parse(Export, "export", arguments)
    model = export(args.checkpoint, args.out, kind=args.weights, dtype=args.dtype)
    config = model.config
    Console().print(
        f"{args.out}: {config.model.architecture} of step {model.step:,}, trained with "
        f"{config.optimizer.name}, {args.weights} weights in {args.dtype}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
