"""`steepest optimizers` and `steepest memory`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from rich.console import Console
from tyro.conf import Positional

from steepest import models
from steepest.cli.arguments import flags_of, parse, value_in_toml
from steepest.errors import UserError
from steepest.optim import catalogue
from steepest.optim.memory import held
from steepest.report import optimizers as about


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
    arguments, given = _hyperparameters_in(arguments, flags_of(Memory))
    args: Memory = parse(Memory, "memory", arguments)
    names = args.optimizer or tuple(
        name
        for name in catalogue.names()
        if given.keys() <= catalogue.recipe(name).hyperparameters().keys()
    )
    with torch.device("meta"):
        model = models.build(models.size(args.model))
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


def _hyperparameters_in(arguments: list[str], flags: list[str]) -> tuple[list[str], dict[str, Any]]:
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
        read = value_in_toml(text)
        given[key] = tuple(read) if isinstance(read, list) else read
    return rest, given
