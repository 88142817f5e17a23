"""Nested dataclasses from and to TOML, with errors that name file, section and key."""

from __future__ import annotations

import dataclasses
import tomllib
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from steepest.errors import UserError, unknown

T = TypeVar("T")

_TYPE_NAMES = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}


def read(cls: type[T], values: Mapping[str, Any], source: str, section: str = "") -> T:
    """Build the dataclass `cls` from `values`; keys that are not given keep their defaults.

    `source` (a file name, say) and `section` (dotted) place the key in error messages.
    Raises UserError for an unknown key, a value of the wrong type, or one out of range.
    """
    arguments = arguments_of(cls, values, source, section)
    try:
        return cls(**arguments)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    except (TypeError, ValueError) as error:
        raise UserError(f"{_place(source, section)}: {error}") from error


def arguments_of(
    cls: type[Any], values: Mapping[str, Any], source: str, section: str = ""
) -> dict[str, Any]:
    """Return the fields that `values` gives the dataclass `cls`, each in its type.

    Raises UserError as `read` does; how fields go together is not looked at.
    """
    place = _place(source, section)
    if not isinstance(values, Mapping):
        raise UserError(f"{place}: must be a table of keys, not {values!r}.")
    hints = get_type_hints(cls)
    arguments: dict[str, Any] = {}
    for key, value in values.items():
        if key not in hints:
            if not section and key == "runtime":
                raise UserError(
                    f"{source}: [runtime] is no part of what a run is; give it by flags, as in "
                    "--runtime.threads 1."
                )
            raise UserError(f"{place}: {unknown('key', key, hints)}")
        name = f"{section}.{key}" if section else key
        if (kind := _table(hints[key], value, f"{source}, section [{name}]")) is not None:
            arguments[key] = read(kind, value, source, name)
        else:
            arguments[key] = _value(hints[key], value, f"{place}: {key}")
    return arguments


def _place(source: str, section: str) -> str:
    return f"{source}, section [{section}]" if section else source


def _table(hint: Any, value: Any, where: str) -> Any:
    """Return the dataclass that a table is read as, None if `hint` asks for a plain value.

    Of several dataclasses the one is taken whose `architecture`, a literal, is that of the table;
    without that key, the first.
    """
    kinds = [kind for kind in (hint, *get_args(hint)) if dataclasses.is_dataclass(kind)]
    if len(kinds) < 2 or not isinstance(value, Mapping) or "architecture" not in value:
        return kinds[0] if kinds else None
    named = {get_args(get_type_hints(kind)["architecture"])[0]: kind for kind in kinds}
    name = value["architecture"]
    if not isinstance(name, str) or name not in named:
        raise UserError(f"{where}: {unknown('architecture', str(name), named)}")
    return named[name]


def _value(hint: Any, value: Any, where: str) -> Any:
    """Return `value` as the type `hint` asks, or raise UserError; `where` begins the sentence."""
    origin = get_origin(hint)
    if origin is Literal:
        if value not in get_args(hint):
            options = ", ".join(repr(option) for option in get_args(hint))
            raise UserError(f"{where} must be one of {options}, not {value!r}.")
        return value
    if origin is dict:
        return _options(value, where)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise UserError(f"{where} must be a list, not {value!r}.")
        return tuple(_value(get_args(hint)[0], item, where) for item in value)
    if origin in (Union, types.UnionType):  # "T or nothing" is the only union in use
        (hint,) = (option for option in get_args(hint) if option is not types.NoneType)
        if value is None:
            return None
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise UserError(f"{where} must be a number below 1.8e308.") from None
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise UserError(f"{where} must be {_TYPE_NAMES[hint]}, not {value!r}.")
    return value


def _options(value: Any, where: str) -> dict[str, Any]:
    """Check a table of hyperparameters: each a plain value or a list of plain values."""
    if not isinstance(value, Mapping):
        raise UserError(f"{where} must be a table of hyperparameters, not {value!r}.")
    for name, option in value.items():
        for item in option if isinstance(option, (list, tuple)) else [option]:
            if not isinstance(item, (bool, int, float, str)):
                raise UserError(
                    f"{where}.{name} must be a number, a string, true or false, "
                    f"or a list of these, not {option!r}."
                )
    return dict(value)


def to_dict(config: Any) -> dict[str, Any]:
    """Return a dataclass as nested dictionaries; float fields are floats, tuples are lists."""
    hints = get_type_hints(type(config))
    return {key: _plain(getattr(config, key), hint) for key, hint in hints.items()}


def _plain(value: Any, hint: Any = None) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return float(value) if hint is float else value


def load_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file. Raises UserError if it is missing, unreadable or not TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid TOML: {error}.") from None


def dump_toml(values: Mapping[str, Any]) -> str:
    """Return `values` as TOML. Keys whose value is None are left out, as TOML has no null."""
    try:
        import tomli_w
    except ImportError:
        raise UserError(
            "Writing TOML needs tomli_w; install it with: pip install 'steepest[bench]'."
        ) from None
    return tomli_w.dumps(_without_none(values))


def _without_none(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without_none(value) if isinstance(value, Mapping) else value
        for key, value in values.items()
        if value is not None
    }
