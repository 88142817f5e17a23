"""Reading a sub-command's arguments: a frozen dataclass whose fields are flags."""

from __future__ import annotations

import inspect
import io
import tomllib
from contextlib import redirect_stderr
from typing import Any, get_origin

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from steepest.cli.mistakes import first_mistake, flags_and_types
from steepest.errors import UserError, unknown

HELP = ("-h", "--help")
OPTIONS = "--optimizer.options"
REGISTRY = ConstructorRegistry()
"""How tyro reads what steepest writes otherwise: hyperparameters."""


def parse(kind: type[Any], name: str, arguments: list[str], default: Any = None) -> Any:
    """Return the arguments of a sub-command; with --help, print what it takes and exit.

    Raises UserError, a sentence with the nearest flag or what the flag takes, where they are wrong.
    """
    if wants_help(arguments):
        arguments = ["--help"]
    flags = [flag for flag, _ in flags_and_types(kind)]
    for word in arguments:
        flag = word.partition("=")[0].replace("_", "-")
        if flag.startswith("--") and flag not in (*flags, *HELP):
            raise unknown("flag", flag, flags or ["--help"])
    given = {} if default is None else {"default": default}
    try:
        with redirect_stderr(io.StringIO()):
            parsed, rest = tyro.cli(
                kind,
                args=arguments,
                prog=f"steepest {name}",
                description=inspect.getdoc(kind),
                return_unknown_args=True,
                config=(tyro.conf.FlagConversionOff,),
                registry=REGISTRY,
                **given,
            )
    except SystemExit as stop:
        if wants_help(arguments):
            raise
        raise _reason(stop, kind, name, arguments) from None
    if rest:
        raise UserError(f"{name} takes no {rest[0]!r}; steepest {name} --help lists what it takes.")
    return parsed


def wants_help(arguments: list[str]) -> bool:
    """Return whether the arguments ask what a command takes, whatever else they say."""
    return not set(HELP).isdisjoint(arguments)


def _reason(stop: SystemExit, kind: type[Any], name: str, arguments: list[str]) -> UserError:
    """Return why tyro did not take the arguments.

    What a dataclass refused is its own sentence, and is why tyro stopped; for the rest tyro has
    boxes of text, and the arguments are looked through once more.
    """
    error: BaseException | None = stop
    while error is not None:
        if isinstance(error, UserError):
            return error
        error = error.__context__
    mistake = first_mistake(kind, arguments)
    return UserError(mistake or f"{name} cannot read its arguments; see steepest {name} --help.")


def flags_of(kind: type[Any]) -> list[str]:
    """Return the flags of a sub-command without their dashes, those of its sections with dots."""
    return [flag.removeprefix("--") for flag, _ in flags_and_types(kind)]


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


def value_in_toml(text: str) -> Any:
    """Return a number, true or false, or a list, with or without its brackets, as TOML has them.

    Any other text is itself.
    """
    written = {"True": "true", "False": "false"}.get(text, text)
    for value in (written, f"[{written}]") if "," in written else (written,):
        try:
            return tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            continue
    return text


@REGISTRY.primitive_rule
def hyperparameters(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[dict[str, Any]] | None:
    """Let tyro read and show a dictionary of hyperparameters as NAME=VALUE."""
    if get_origin(info.type) is not dict:
        return None

    def read(words: list[str]) -> dict[str, Any]:
        for word in words:
            if "=" not in word:
                raise UserError(
                    f"{OPTIONS} takes NAME=VALUE, as in weight_decay=0.1 betas=0.9,0.95, "
                    f"not {word!r}."
                )
        pairs = (word.partition("=") for word in words)
        return {name: value_in_toml(value) for name, _, value in pairs}

    return PrimitiveConstructorSpec(
        nargs="*",
        metavar="NAME=VALUE ...",
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda value: [f"{name}={item}" for name, item in value.items()],
    )
