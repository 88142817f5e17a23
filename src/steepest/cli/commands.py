"""The commands, and what happens to an error in one."""

from __future__ import annotations

import os
import select
import signal
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import NoReturn

from steepest.errors import UserError, unknown

INTERRUPTED = 130
"""Exit code after Ctrl-C, 128 + SIGINT, as shells have it."""
BROKEN_PIPE = 141
"""Exit code where nobody reads the output any more, 128 + SIGPIPE."""


@dataclass(frozen=True)
class Command:
    """A sub-command: the function that does it, and what the overview says of it."""

    place: str
    """Module and function, as in "race:race"."""
    summary: str
    """First line of its help."""
    continues: bool = False
    """Whether, stopped and started again, it goes on where it was."""

    def function(self) -> Callable[[list[str]], None]:
        """Return what takes the arguments and does it."""
        module, name = self.place.split(":")
        function: Callable[[list[str]], None] = getattr(
            import_module(f"steepest.cli.{module}"), name
        )
        return function


def main() -> None:
    """Run the command line: print the error and exit with 2 for input that cannot work."""
    if missing := [name for name in ("rich", "tyro") if find_spec(name) is None]:
        sys.exit(f"steepest: the command line needs {missing[0]}; pip install 'steepest[bench]'.")
    # torch warns about its own code when it compiles.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\._inductor")
    name, *rest = sys.argv[1:] or ["--help"]
    try:
        try:
            run(name, rest)
        finally:
            sys.stdout.flush()
    except UserError as error:
        _end(str(error), 2)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # for a second one, while this one ends
        again = name in COMMANDS and COMMANDS[name].continues
        how = "; the same command continues where this one was." if again else "."
        _end(f"stopped{how}", INTERRUPTED)
    except BrokenPipeError:
        if not _output_is_closed():
            raise
        sys.exit(BROKEN_PIPE)
    except OSError as error:  # of the files that the arguments name: a permission, a full disk
        if error.filename is None:
            raise
        _end(f"{error.filename}: {error.strerror}.", 2)
    except RuntimeError as error:
        if not _is_lack_of_memory(error):
            raise
        reason = str(error).splitlines()[0]
        _end(f"There is not enough memory ({reason}); `steepest plan` says what a run takes.", 2)


def _end(sentence: str, code: int) -> NoReturn:
    print(f"steepest: {sentence}", file=sys.stderr)
    sys.exit(code)


def run(name: str, arguments: list[str]) -> None:
    """Do a sub-command, or print what there is."""
    if name in ("-h", "--help"):
        overview()
        return
    if name not in COMMANDS:
        raise unknown("command", name, [*COMMANDS, "--help"])
    COMMANDS[name].function()(arguments)


def overview() -> None:
    """Print what there is."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False)
    for name, command in COMMANDS.items():
        table.add_row(f"  steepest {name}", command.summary)
    console = Console()
    console.print("Which optimizer trains language models best?\n")
    console.print(table)
    console.print("\nEach has --help.")


def _is_lack_of_memory(error: RuntimeError) -> bool:
    """Return whether an allocator of torch has failed, which on a CPU has no class of its own."""
    return type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in str(error)


def _output_is_closed() -> bool:
    """Return whether the reader of the output has gone; what is still to be written is dropped."""
    poller = select.poll()
    poller.register(sys.stdout, 0)  # errors are reported whatever is asked for
    if not poller.poll(0):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


COMMANDS = {
    "race": Command(
        "race:race",
        "Race optimizers: tune each one's learning rate, rank them on fresh seeds, write a report.",
        continues=True,
    ),
    "train": Command(
        "train:train_one",
        "Train one model: config from a TOML file, flags on top.",
        continues=True,
    ),
    "plan": Command(
        "plan:plan_run",
        "Show what a run would take: memory, time, energy. Arguments are those of steepest train.",
    ),
    "report": Command(
        "race:report", "Write the report of a race again, and print its leaderboard."
    ),
    "export": Command(
        "export:export_model",
        "Write a trained model as a folder that Hugging Face's AutoModelForCausalLM loads.",
    ),
    "generate": Command("generate:generate_text", "Continue a text with a trained model."),
    "data": Command(
        "data:data",
        "Prepare a corpus as tokens, list corpora and tokenizers, or inspect what was prepared.",
        continues=True,
    ),
    "optimizers": Command("optimizers:optimizers", "List the optimizers, or show one in detail."),
    "memory": Command(
        "optimizers:memory",
        "Show what weights, gradients and optimizer state take, without allocating them.",
    ),
    "models": Command("models:list_models", "List the model sizes."),
}
