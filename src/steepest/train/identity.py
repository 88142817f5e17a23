"""The identity of a run: a hash over the content of everything that can change a loss."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def config_hash(values: dict[str, Any]) -> str:
    """Return 12 hexadecimal digits for a run config given as nested dictionaries.

    Every key counts, whether it has its default or not, except where a file is: the corpus is
    replaced by `data.fingerprint`, the path of an optimizer's file by `optimizer.source_sha256`.
    Raises ValueError if one of these two is needed and empty.
    """
    data, optimizer = dict(values["data"]), dict(values["optimizer"])
    if not data["fingerprint"]:
        raise ValueError("The hash of a run needs data.fingerprint: resolve the config first.")
    del data["corpus"]
    if is_class(optimizer["name"]):
        if not optimizer["source_sha256"]:
            raise ValueError(
                "The hash of a run needs optimizer.source_sha256: resolve the config first."
            )
        location, _, name = optimizer["name"].rpartition(":")
        optimizer["name"] = f":{name}" if is_file(location) else optimizer["name"]
    content = _canonical({**values, "data": data, "optimizer": optimizer})
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def is_class(name: str) -> bool:
    """Return whether a name is "file.py:Class" or "module:Class", not one of the catalogue."""
    return ":" in name


def is_file(location: str) -> bool:
    """Return whether the part of a class's name before the colon is a file, not a module."""
    return location.endswith(".py")


def _canonical(value: Any) -> Any:
    """Write equal numbers equally: 1 and 1.0 are one, so are a list and a tuple."""
    if isinstance(value, dict):
        return {key: _canonical(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_canonical(item) for item in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value
