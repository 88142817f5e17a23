"""The identity of a run: a hash over the content of everything that can change a loss."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def config_hash(values: dict[str, Any]) -> str:
    """Return 12 hexadecimal digits for a run config given as nested dictionaries.

    Every key counts, whether it has its default or not, except where a file is: the corpus is
    replaced by `data.fingerprint`, the path of an optimizer's file by `optimizer.source_sha256`.
    Raises ValueError if one of these two is needed and empty, or the precision left to the device.
    """
    if not values["data"]["fingerprint"]:
        raise ValueError("The hash of a run needs data.fingerprint: resolve the config first.")
    if is_class(values["optimizer"]["name"]) and not values["optimizer"]["source_sha256"]:
        raise ValueError(
            "The hash of a run needs optimizer.source_sha256: resolve the config first."
        )
    if values.get("training", {}).get("precision") == "auto":
        raise ValueError("The hash of a run needs training.precision: resolve the config first.")
    text = json.dumps(_content(values), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def differences(there: dict[str, Any], here: dict[str, Any], place: str) -> list[str]:
    """Return a clause per key that has another value in one run config than in another one.

    Both are nested dictionaries; what doesn't enter the hash doesn't count. `place` says where
    `there` was found: "optimizer.lr is 0.001 in results/runs/ab and 0.002 here".
    """
    old, new = flat(_content(there)), flat(_content(here))
    return [
        f"{key} is {_shown(old.get(key))} in {place} and {_shown(new.get(key))} here"
        for key in sorted(old.keys() | new.keys())
        if not _same(old.get(key), new.get(key))
    ]


def is_class(name: str) -> bool:
    """Return whether a name is "file.py:Class" or "module:Class", not one of the catalogue."""
    return ":" in name


def is_file(location: str) -> bool:
    """Return whether the part of a class's name before the colon is a file, not a module."""
    return location.endswith(".py")


def _content(values: dict[str, Any]) -> dict[str, Any]:
    """Return what a run's identity is made of."""
    data, optimizer = dict(values["data"]), dict(values["optimizer"])
    del data["corpus"]
    location, _, name = optimizer["name"].rpartition(":")
    if is_file(location):
        optimizer["name"] = f":{name}"
    content: dict[str, Any] = _canonical({**values, "data": data, "optimizer": optimizer})
    return content


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested dictionaries as one, with dotted keys."""
    leaves: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            leaves |= flat(value, f"{prefix}{key}.")
        else:
            leaves[prefix + key] = value
    return leaves


def _same(old: Any, new: Any) -> bool:
    return json.dumps(old) == json.dumps(new)  # unlike ==, which takes True for 1


def _shown(value: Any) -> str:
    return "not set" if value is None else json.dumps(value)


def _canonical(value: Any) -> Any:
    """Write equal numbers equally: 1 and 1.0 are one, so are a list and a tuple."""
    if isinstance(value, dict):
        return {key: _canonical(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_canonical(item) for item in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value
