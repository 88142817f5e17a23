"""What is wrong with arguments that tyro did not take, in a sentence."""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from steepest.errors import unknown

KINDS = {int: "a whole number", float: "a number", bool: "True or False"}


def first_mistake(kind: type[Any], arguments: list[str]) -> str:
    """Return a sentence on the first argument that is wrong, or on one that is missing.

    `kind` is the dataclass of a sub-command's arguments. Empty if nothing is found.
    """
    hints = dict(flags_and_types(kind))
    positional, given = _words_of(arguments, hints)
    for flag, words in given:
        if sentence := _mistake(flag, hints[flag], words):
            return sentence
    for word in positional:
        if word.startswith("-"):
            return str(unknown("flag", word, list(hints) or ["--help"]))
    needed = list(_needed(kind))
    missing = [flag for flag in needed if flag.startswith("--") and flag not in dict(given)]
    missing += [name for name in needed if not name.startswith("--") and not positional]
    return f"{missing[0]} is needed, and is not given." if missing else ""


def flags_and_types(kind: type[Any], prefix: str = "--") -> Iterator[tuple[str, Any]]:
    """Yield the flags of a sub-command, those of its sections with dots, and their types."""
    hints = get_type_hints(kind, include_extras=True)
    for part in fields(kind):
        hint, flag = hints[part.name], f"{prefix}{part.name}".replace("_", "-")
        if is_dataclass(part.default_factory):
            yield from flags_and_types(part.default_factory, f"{flag}.")
        elif not _is_positional(hint):
            yield flag, hint


def _needed(kind: type[Any]) -> Iterator[str]:
    """Yield the flags that have no default, and the names of such positional arguments."""
    hints = get_type_hints(kind, include_extras=True)
    for part in fields(kind):
        if part.default is MISSING and part.default_factory is MISSING:
            name = part.name.replace("_", "-")
            yield name.upper() if _is_positional(hints[part.name]) else f"--{name}"


def _is_positional(hint: Any) -> bool:
    return get_origin(hint) is Annotated


def _words_of(
    arguments: list[str], hints: dict[str, Any]
) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Return words that belong to no flag, and the flags with the words that follow them."""
    positional: list[str] = []
    given: list[tuple[str, list[str]]] = []
    for word in arguments:
        name, equals, value = word.partition("=")
        flag = name.replace("_", "-")
        if flag in hints:
            given.append((flag, [value] if equals else []))
        elif given and (_is_list(hints[given[-1][0]]) or not given[-1][1]):
            given[-1][1].append(word)
        else:
            positional.append(word)
    return positional, given


def _is_list(hint: Any) -> bool:
    return get_origin(hint) in (tuple, dict)


def _mistake(flag: str, hint: Any, words: list[str]) -> str:
    """Return what is wrong with the words behind a flag; empty if nothing is."""
    if get_origin(hint) is dict:
        return ""
    if get_origin(hint) is tuple:
        hint = get_args(hint)[0]
    elif not words:
        return f"{flag} needs a value: {_wanted(hint)}."
    for word in words:
        if not _fits(hint, word):
            wanted = _wanted(hint)
            nearest = str(unknown("value", word, _choices(hint))) if _choices(hint) else ""
            near = nearest.partition("; ")[2] if "did you mean" in nearest else ""
            return f"{flag} must be {wanted}, not {word!r}" + (f"; {near}" if near else ".")
    return ""


def _options(hint: Any) -> tuple[Any, ...]:
    """Return the types that a flag's value may have."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _choices(hint: Any) -> list[str]:
    return [str(c) for o in _options(hint) if get_origin(o) is Literal for c in get_args(o)]


def _wanted(hint: Any) -> str:
    """Return what a flag takes, in words."""
    if choices := _choices(hint):
        *most, last = choices
        return f"{', '.join(most)} or {last}" if most else last
    return next((KINDS[option] for option in _options(hint) if option in KINDS), "text")


def _fits(hint: Any, word: str) -> bool:
    """Return whether a word can be read as a type."""
    for option in _options(hint):
        if option is types.NoneType:
            fits = word == "None"
        elif option is bool:
            fits = word in ("True", "False")
        elif get_origin(option) is Literal:
            fits = word in map(str, get_args(option))
        elif option in (int, float):
            fits = _is_number(option, word)
        else:
            fits = True
        if fits:
            return True
    return False


def _is_number(kind: type[int] | type[float], word: str) -> bool:
    try:
        kind(word)
    except ValueError:
        return False
    return True
