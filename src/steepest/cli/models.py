"""`steepest models`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from steepest import models
from steepest.cli.arguments import parse
from steepest.report import formatting


@dataclass(frozen=True)
class Models:
    """List the model sizes."""


def list_models(arguments: list[str]) -> None:
    """List the model sizes, under the names of their architectures."""
    parse(Models, "models", arguments)
    table = Table(box=None, pad_edge=False)
    table.add_column("architecture, name", no_wrap=True)
    for title in ("parameters", "active", "layers", "hidden", "heads", "vocabulary"):
        table.add_column(title, justify="right", no_wrap=True)
    sizes = models.sizes()
    for architecture in models.ARCHITECTURES:
        table.add_row(architecture, style="bold")
        for name, config in sizes.items():
            if config.architecture == architecture:
                table.add_row(f"  {name}", *_numbers(config))
    console = Console()
    console.print(table)
    console.print("\nActive are the parameters that a token goes through.")


def _numbers(config: models.Config) -> Iterator[str]:
    parameters = models.parameter_count(config)
    yield formatting.count(parameters.total)
    yield formatting.count(parameters.active)
    for number in (config.layers, config.hidden_size, config.heads, config.vocab_size):
        yield f"{number:,}"
