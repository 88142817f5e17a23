"""The commands, and what happens to an error in one."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table

from steepest.cli.data import Data, data
from steepest.cli.export import Export, export_model
from steepest.cli.generate import Generate, generate_text
from steepest.cli.models import Models, list_models
from steepest.cli.optimizers import Memory, Optimizers, memory, optimizers
from steepest.cli.plan import Plan, plan_run
from steepest.cli.race import Race, Report, race, report
from steepest.cli.train import Train, train_one
from steepest.errors import UserError, unknown


def main() -> None:
    """Run the command line: print the error and exit with 2 for input that cannot work."""
    # torch warns about its own code when it compiles.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\._inductor")
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


COMMANDS: dict[str, tuple[type[Any], Callable[[list[str]], None]]] = {
    "race": (Race, race),
    "train": (Train, train_one),
    "plan": (Plan, plan_run),
    "report": (Report, report),
    "export": (Export, export_model),
    "generate": (Generate, generate_text),
    "data": (Data, data),
    "optimizers": (Optimizers, optimizers),
    "memory": (Memory, memory),
    "models": (Models, list_models),
}
