"""Documents written to files of every format that can be read, for tests of the readers."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
zstandard = pytest.importorskip("zstandard")

DOCUMENTS = (
    "one",
    "two\nlines and\r\na carriage return",
    "  spaces are kept \t",
    "",
    "naïve 日本語 \u2028 😀 \x85 <|endoftext|>",
    " \n ",
    "last of a file\n",
    "x" * 3000,
    *(f"document {index}" for index in range(5)),
)
READ = tuple(document for document in DOCUMENTS if document.strip())


def json_lines(documents: Sequence[str], column: str = "text") -> bytes:
    """One JSON object a line, with a further column before and after the text."""
    lines = (
        json.dumps({"id": i, column: text, "meta": {"n": i}}, ensure_ascii=i % 2 == 0)
        for i, text in enumerate(documents)
    )
    return "".join(f"{line}\n" for line in lines).encode()


def gzipped(data: bytes) -> bytes:
    """Two members, as tools that append write them."""
    half = len(data) // 2
    return gzip.compress(data[:half]) + gzip.compress(data[half:])


def zstandard_compressed(data: bytes) -> bytes:
    """Two frames, as parallel compressors write them."""
    half = len(data) // 3
    compressor = zstandard.ZstdCompressor()
    return compressor.compress(data[:half]) + compressor.compress(data[half:])


def write_parquet(path: Path, documents: Sequence[str], rows: int = 4, **columns: Any) -> None:
    """Row groups of `rows` rows."""
    table = pa.table({"id": list(range(len(documents))), "text": list(documents), **columns})
    pq.write_table(table, path, row_group_size=rows)


def write(path: Path, documents: Sequence[str]) -> Path:
    """Write the documents in the format that the name ends in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    name = path.name
    if name.endswith(".parquet"):
        write_parquet(path, documents)
    elif name.endswith(".txt"):
        path.write_text("\f".join(documents), encoding="utf-8", newline="")
    else:
        data = json_lines(documents)
        data = gzipped(data) if name.endswith(".gz") else data
        data = zstandard_compressed(data) if name.endswith(".zst") else data
        path.write_bytes(data)
    return path
