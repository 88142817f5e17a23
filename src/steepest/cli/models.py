"""`steepest models`."""

from __future__ import annotations

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
    """List the model sizes."""
    parse(Models, "models", arguments)
    table = Table("name", "parameters", "layers", "hidden", "heads", "vocabulary", box=None)
    for name, config in models.sizes().items():
        total = formatting.count(models.parameter_count(config).total)
        numbers = (config.layers, config.hidden_size, config.heads, config.vocab_size)
        table.add_row(name, total, *map(str, numbers))
    Console().print(table)
