"""One file fetched once, and known by its digest."""

from __future__ import annotations

import hashlib
import urllib.request
from pathlib import Path

from steepest import files
from steepest.errors import UserError

TIMEOUT = 30.0  # seconds without an answer


def fetched(url: str, file: Path, sha256: str) -> Path:
    """Return `file`, fetched from `url` unless it is there; the file appears whole or not at all.

    Raises UserError when it cannot be fetched, and when its SHA-256 is another one.
    """
    data = file.read_bytes() if file.exists() else _fetch(url, file)
    digest = hashlib.sha256(data).hexdigest()
    if digest != sha256:
        where = file if file.exists() else url
        raise UserError(
            f"{where} is not the file that is meant: its SHA-256 is {digest} instead of {sha256}."
        )
    if not file.exists():
        files.write_bytes(file, data)
    return file


def _fetch(url: str, file: Path) -> bytes:
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as answer:
            data: bytes = answer.read()
    except OSError as error:
        raise UserError(
            f"{url} cannot be fetched ({error}); fetch it by other means and put it at {file}."
        ) from error
    return data
