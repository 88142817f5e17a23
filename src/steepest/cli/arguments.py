"""Reading a sub-command's arguments: a frozen dataclass whose fields are flags."""

from __future__ import annotations

import tomllib
from dataclasses import fields, is_dataclass
from typing import Any

import tyro

from steepest.errors import UserError, unknown
from steepest.optim import catalogue


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


def value_of(flag: str, arguments: list[str]) -> str | None:
    """Take a flag and its value out of the arguments; None if it is not there.

    Raises UserError for a flag without a value.
    """
    for index, word in enumerate(arguments):
        name, equals, value = word.partition("=")
        if name != flag:
            continue
        del arguments[index]
        if not equals:
            if index == len(arguments) or arguments[index].startswith("--"):
                raise UserError(f"{flag} needs a value.")
            value = arguments.pop(index)
        return value
    return None


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
