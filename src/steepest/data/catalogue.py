"""The corpora that are known by name: `corpora.toml` as entries."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Literal

Kind = Literal["embedded", "hub", "file", "mix"]


@dataclass(frozen=True)
class Entry:
    """What is known of a corpus before it is read; `corpora.toml` says what the fields mean.

    `own_validation`: it ships a validation split. `column` holds the text. `articles`: its rows are
    lines of articles. `documents`, `tokens`, `bytes` and `download` (bytes) are None where they are
    not published.
    """

    name: str
    kind: Kind
    title: str
    source: str
    licence: str
    layout: str
    own_validation: bool
    note: str
    hub: str = ""
    config: str | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    column: str = "text"
    articles: bool = False
    url: str = ""
    sha256: str = ""
    parts: tuple[str, ...] = ()
    documents: int | None = None
    tokens: int | None = None
    bytes: int | None = None
    download: int | None = None


def corpora() -> dict[str, Entry]:
    """Return the catalogue by name, in the order of `corpora.toml`."""
    text = folder().joinpath("corpora.toml").read_text(encoding="utf-8")
    return {name: _entry(name, values) for name, values in tomllib.loads(text).items()}


def folder() -> Traversable:
    """Return the folder of the catalogue and the embedded corpora."""
    return resources.files("steepest.data").joinpath("corpora")


def _entry(name: str, values: dict[str, object]) -> Entry:
    parts = values.pop("parts", [])
    return Entry(name=name, parts=tuple(parts), **values)  # type: ignore[arg-type]
