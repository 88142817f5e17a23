"""Text files as documents: a file is one, or is cut at form feeds or at blank lines."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from steepest.data.streams import CHUNK, Place, decoded, opened

FORM_FEED = b"\f"
MIN_PASSAGE_CHARACTERS = 2000


def whole(file: Path, place: Place) -> Iterator[str]:
    """Yield the text of a file as one document, unless `place` is behind it."""
    if place.row == 0:
        with opened(file, place) as stream:
            data = stream.read()
        place.row = 1
        place.offset = len(data)
        yield decoded(data, file, 0)


def parts(file: Path, place: Place) -> Iterator[str]:
    """Yield the documents of a file from `place` on.

    They are separated by form feeds; having none, the file is cut at blank lines into passages of
    at least 2000 characters. No more than two documents are in memory.
    """
    with opened(file, Place()) as stream:
        separated = _has_form_feed(stream)
    with opened(file, place) as stream:
        documents = _between_form_feeds if separated else _passages
        yield from documents(file, stream, place)


def _has_form_feed(stream: BinaryIO) -> bool:
    return any(FORM_FEED in chunk for chunk in iter(lambda: stream.read(CHUNK), b""))


def _between_form_feeds(file: Path, stream: BinaryIO, place: Place) -> Iterator[str]:
    pieces: list[bytes] = []
    start = place.offset
    for line in stream:
        *endings, rest = line.split(FORM_FEED)
        for ending in endings:
            pieces.append(ending)
            data = b"".join(pieces)
            text = decoded(data, file, start)
            start += len(data) + len(FORM_FEED)
            place.offset, place.row = start, place.row + 1
            yield text
            pieces = []
        pieces.append(rest)
    data = b"".join(pieces)
    place.offset, place.row = start + len(data), place.row + 1
    yield decoded(data, file, start)


def _passages(file: Path, stream: BinaryIO, place: Place) -> Iterator[str]:
    """Group paragraphs into passages; a shorter rest joins the last one.

    So a passage is held back until the next is whole, and `place` is behind it, not behind what
    was read.
    """
    held: tuple[str, int] | None = None
    pending: list[str] = []
    size = 0
    end = place.offset
    for paragraph, end in _paragraphs(file, stream, place.offset):
        pending.append(paragraph)
        size += len(paragraph)
        if size >= MIN_PASSAGE_CHARACTERS:
            if held is not None:
                place.offset, place.row = held[1], place.row + 1
                yield held[0]
            held = "\n\n".join(pending), end
            pending, size = [], 0
    if held is not None or pending:
        place.offset, place.row = end, place.row + 1
        yield "\n\n".join(([held[0]] if held is not None else []) + pending)


def _paragraphs(file: Path, stream: BinaryIO, start: int) -> Iterator[tuple[str, int]]:
    """Yield what stands between runs of blank lines, and where in the file the next one begins.

    A line feed before and after makes a blank line, so neither the first line of a file nor one
    that nothing follows is one.
    """
    lines: list[str] = []
    behind_blank_lines = False
    position = start
    for data in stream:
        line = decoded(data, file, position)
        if line.isspace() and line.endswith("\n") and position > 0:
            behind_blank_lines = True
        else:
            if behind_blank_lines:
                yield "".join(lines).removesuffix("\n"), position
                lines, behind_blank_lines = [], False
            lines.append(line)
        position += len(data)
    if behind_blank_lines:
        yield "".join(lines).removesuffix("\n"), position
    elif lines:
        yield "".join(lines), position
