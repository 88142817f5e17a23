"""Plain, gzip and zstd files as streams of bytes; a damaged one never ends silently."""

from __future__ import annotations

import gzip
import importlib
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from steepest.errors import UserError

CHUNK = 2**16  # bytes asked of a stream at once
ZSTD_CHUNK = 2**13  # compressed bytes decoded at once; what comes out of them is in memory
ZSTD_WINDOW = 2**31  # the largest: what `zstd --long=31` writes
EXTRA = "data"


@dataclass
class Place:
    """Where reading stands: the file of a list, and the bytes and rows of it that are done.

    Bytes are counted after decompression. A reader of a format moves it before it yields.
    """

    file: int = 0
    offset: int = 0
    row: int = 0


@contextmanager
def opened(file: Path, place: Place) -> Iterator[BinaryIO]:
    """Open a file at `place.offset`, decompressed when its name ends in .gz or .zst.

    Compressed bytes before the offset are decoded and dropped. Raises UserError, naming the row
    that `place` has come to, when the file cannot be read, is damaged or is cut short.
    """
    try:
        with _decompressed(file) as stream:
            _skip(stream, place.offset, seekable=file.suffix not in {".gz", ".zst"})
            yield stream
    except (EOFError, zlib.error, gzip.BadGzipFile, _BadZstdFile) as error:
        raise UserError(
            f"File {file} is damaged or cut short behind row {place.row} ({error}); fetch it again."
        ) from error
    except OSError as error:
        raise UserError(f"File {file} cannot be read: {error.strerror or error}.") from error


def required(module: str, purpose: str) -> Any:
    """Import a module of the extra `data`; raise UserError when it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise UserError(
            f"{purpose} needs the package {package!r}: pip install 'steepest[{EXTRA}]'."
        ) from error


def decoded(data: bytes, file: Path, offset: int) -> str:
    """Decode UTF-8, without a byte order mark at the start of a file.

    `offset` is where in the file `data` begins. Raises UserError that names the byte.
    """
    try:
        return data.decode("utf-8-sig" if offset == 0 else "utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"File {file} is not UTF-8 (byte {offset + error.start}); convert it, "
            "for example with `iconv -t utf-8`."
        ) from error


def _decompressed(file: Path) -> BinaryIO:
    if file.suffix == ".gz":
        return cast(BinaryIO, io.BufferedReader(cast(Any, gzip.open(file)), CHUNK))
    if file.suffix == ".zst":
        return io.BufferedReader(_ZstdFile(file), CHUNK)
    return file.open("rb")


def _skip(stream: BinaryIO, count: int, *, seekable: bool) -> None:
    if seekable:
        stream.seek(count)
        return
    while count and (dropped := stream.read(min(count, CHUNK))):
        count -= len(dropped)


class _BadZstdFile(Exception):
    """A zstd file is damaged or has no end."""


class _ZstdFile(io.RawIOBase):
    """The decompressed bytes of a zstd file of one or more frames.

    zstandard's own reader takes a file that was cut short for one that ended.
    """

    def __init__(self, file: Path) -> None:
        self._zstd = required("zstandard", f"Reading {file}")
        self._source = file.open("rb")
        self._frame: Any = None
        self._compressed = b""
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            if not self._decode():
                return 0
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def close(self) -> None:
        self._source.close()
        super().close()

    def _decode(self) -> bool:
        """Decode the next chunk; return whether there was one."""
        self._compressed = self._compressed or self._source.read(ZSTD_CHUNK)
        if not self._compressed:
            if self._frame is not None:
                raise _BadZstdFile("the last frame has no end")
            return False
        if self._frame is None:
            self._frame = self._zstd.ZstdDecompressor(max_window_size=ZSTD_WINDOW).decompressobj()
        try:
            self._ready = memoryview(self._frame.decompress(self._compressed))
        except self._zstd.ZstdError as error:
            raise _BadZstdFile(str(error)) from error
        self._compressed = b""
        if self._frame.eof:
            self._compressed = self._frame.unused_data
            self._frame = None
        return True
