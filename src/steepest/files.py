"""Atomic writes: a reader sees the old file or the new one, never half of either."""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from steepest.errors import UserError

CONTINUES = "; what is complete was kept, and the same command continues from there."
"""What to do when the disk fails on the way."""

LEFTOVER = re.compile(r"\..+\.[a-z0-9_]{8}")
"""Names of what is not yet complete, as `tempfile` makes them. Killed processes leave it."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it replaces `path`, on error it is removed.

    The file and its folder are flushed to disk before and after the rename, so that the
    replacement also survives a power cut.
    """
    make_folder(path.parent)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        temporary.chmod(0o644)
        yield temporary
        flush(temporary)
        temporary.replace(path)
        flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on success it becomes `path`, on error it is removed.

    Its files are flushed to disk. Raises OSError if there is something at `path` in the end, an
    empty folder aside.
    """
    make_folder(path.parent)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        temporary.chmod(0o755)
        yield temporary
        for part in (*temporary.rglob("*"), temporary):
            flush(part)
        temporary.replace(path)
        flush(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def make_folder(path: Path) -> None:
    """Make a folder and those above it, if they are not there, such that they survive a power cut.

    Raises OSError if that cannot be done.
    """
    if path.is_dir():
        return
    make_folder(path.parent)
    path.mkdir(exist_ok=True)
    flush(path.parent)


def remove_leftovers(folder: Path) -> None:
    """Remove the files in a folder that killed processes had not completed.

    No other process may be writing there.
    """
    for path in folder.iterdir():
        if LEFTOVER.fullmatch(path.name) and path.is_file():
            path.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Have a file or folder written to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path` atomically, making its folder if needed."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` in UTF-8 atomically, making its folder if needed."""
    write_bytes(path, text.encode())


@contextmanager
def disk_errors(folder: Path, then: str = CONTINUES) -> Iterator[None]:
    """Turn the errors of a disk that is full or may not be written to into a sentence and `then`.

    What is no error of a file is raised as it is.
    """
    try:
        yield
    except OSError as error:
        reasons = {
            errno.ENOSPC: "the disk is full",
            errno.EDQUOT: "the disk quota is used up",
            errno.EFBIG: "the file would be larger than allowed here",
            errno.EROFS: "the file system is read-only",
            errno.EACCES: "writing there is not permitted",
            errno.EPERM: "writing there is not permitted",
            errno.ENOTDIR: "it is not a folder",
            errno.EEXIST: "it is not a folder",
        }
        if error.errno not in reasons and error.filename is None:
            raise
        reason = reasons.get(error.errno or 0, error.strerror)
        raise UserError(f"{folder} cannot be written to: {reason}{then}") from error


def claim(file: IO[str], work: str, otherwise: str) -> None:
    """Lock a file, opened for reading, too, until it is closed, as when the process dies.

    Raises UserError if another process has it, whose `work` it is, and says what to do `otherwise`
    than to wait. Some network file systems have no locks, of which the user is warned.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise UserError(
            f"Another process ({file.read().strip() or 'just started'}) {work}; wait until it "
            f"ends, or {otherwise}."
        ) from None
    except OSError as error:
        warnings.warn(
            f"{file.name} cannot be locked ({error.strerror}), so see to it that no other process "
            f"{work}.",
            stacklevel=3,
        )


def sign(file: IO[str]) -> None:
    """Write in a claimed file which process has it, for the others to tell."""
    file.truncate(0)
    file.write(f"{os.getpid()} on {platform.node()}\n")
    file.flush()
