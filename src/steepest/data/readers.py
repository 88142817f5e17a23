"""Files of text, JSON lines and Parquet as a stream of documents that continues anywhere."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from steepest.data import text_files
from steepest.data.streams import Place, decoded, opened, required
from steepest.errors import UserError

JSON_LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz")
PARQUET = (".parquet",)
TEXT = (".txt",)
SUFFIXES = (*TEXT, *JSON_LINES, *PARQUET)
PARQUET_ROWS = 64  # decoded at once
PARQUET_BUFFER = 2**20  # bytes of a column read at once


class FileReader:
    """The documents of files, one file after the other; an iterator with a position.

    A .txt file among others is one document, alone it is cut as `text_files.parts` says. Rows whose
    text is null or blank are left out. Memory holds one document, or the rows of one Parquet page.
    Raises UserError, naming file and row, for what cannot be read.
    """

    def __init__(
        self, files: Sequence[Path], column: str, state: dict[str, Any] | None = None
    ) -> None:
        self._files = files
        self._column = column
        self._place = Place(**state) if state is not None else Place()
        self._documents = self._read()

    def __iter__(self) -> FileReader:
        return self

    def __next__(self) -> str:
        return next(self._documents)

    def state(self) -> dict[str, Any]:
        """Return the position behind the last document: file, bytes and rows of it."""
        return vars(self._place).copy()

    def _read(self) -> Iterator[str]:
        place = self._place
        while place.file < len(self._files):
            file = self._files[place.file]
            empty = place.row == 0
            for text in self._texts(file):
                empty = False
                if text and not text.isspace():
                    yield text
            if empty:
                raise UserError(f"File {file} holds no rows; remove it or fetch it again.")
            place.file, place.offset, place.row = place.file + 1, 0, 0

    def _texts(self, file: Path) -> Iterator[str | None]:
        if file.name.endswith(TEXT):
            cut: Callable[[Path, Place], Iterator[str]]
            cut = text_files.parts if len(self._files) == 1 else text_files.whole
            return cut(file, self._place)
        if file.name.endswith(PARQUET):
            return parquet(file, self._column, self._place)
        return json_lines(file, self._column, self._place)


def json_lines(file: Path, column: str, place: Place) -> Iterator[str | None]:
    """Yield the text of each line from `place` on; lines without anything are passed over."""
    with opened(file, place) as stream:
        for data in stream:
            line = decoded(data, file, place.offset)
            place.offset += len(data)
            place.row += 1
            if not line.isspace():
                yield text_of(line, column, f"line {place.row} of {file}")


def text_of(line: str, column: str, where: str) -> str | None:
    """Return the text in a JSON object; raise UserError when there is none to be had."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"There is no valid JSON in {where}: {error}.") from error
    if not isinstance(record, dict):
        raise UserError(
            f"Each line must be one JSON object with its text in {column!r}, but {where} holds "
            f"a {type(record).__name__}."
        )
    if column not in record:
        raise missing_column(column, record, where)
    return checked_text(record[column], column, where)


def checked_text(value: object, column: str, where: str) -> str | None:
    """Return `value` if it is text that UTF-8 can hold, or null; else raise UserError."""
    if value is None:
        return None
    if not isinstance(value, str):
        raise UserError(
            f"Column {column!r} of {where} holds {type(value).__name__} instead of text; "
            "name the column that holds the text."
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"Column {column!r} of {where} holds half a surrogate pair (character {error.start}), "
            "which is not text; replace it."
        ) from error
    return value


def missing_column(column: str, columns: Any, where: str) -> UserError:
    """Return the error for a text column that is not there; it names those that are."""
    there = ", ".join(columns) or "none"
    return UserError(
        f"There is no column {column!r} in {where}; its columns are {there}: "
        "name the one that holds the text."
    )


def parquet(file: Path, column: str, place: Place) -> Iterator[str | None]:
    """Yield the texts of a Parquet file from row `place.row` on, reading that column alone.

    Row groups before it are not touched.
    """
    pyarrow = required("pyarrow", f"Reading {file}")
    pq = required("pyarrow.parquet", f"Reading {file}")
    try:
        with pq.ParquetFile(file, buffer_size=PARQUET_BUFFER) as table:
            _check_column(table.schema_arrow, column, file)
            for value in _values_from(table, column, place.row):
                place.row += 1
                yield checked_text(value, column, f"row {place.row} of {file}")
    except UnicodeDecodeError as error:
        raise UserError(
            f"Column {column!r} of {file} is not UTF-8 within {PARQUET_ROWS} rows behind row "
            f"{place.row}; write the file anew."
        ) from error
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"File {file} is damaged or cut short behind row {place.row} (parquet: {reason}); "
            "fetch it again."
        ) from error


def _check_column(schema: Any, column: str, file: Path) -> None:
    if column not in schema.names:
        raise missing_column(column, schema.names, str(file))
    types = required("pyarrow.types", f"Reading {file}")
    kind = schema.field(column).type
    values = kind.value_type if types.is_dictionary(kind) else kind
    if not any(is_text(values) for is_text in (types.is_string, types.is_large_string)):
        raise UserError(
            f"Column {column!r} of {file} is of type {kind} instead of text; "
            "name the column that holds the text."
        )


def _values_from(table: Any, column: str, row: int) -> Iterator[object]:
    first = 0
    for group in range(table.metadata.num_row_groups):
        count = table.metadata.row_group(group).num_rows
        if first + count > row:
            skipped = max(0, row - first)
            yield from _values_of_group(table, column, group, skipped)
        first += count


def _values_of_group(table: Any, column: str, group: int, skipped: int) -> Iterator[object]:
    batches = table.iter_batches(
        batch_size=PARQUET_ROWS, row_groups=[group], columns=[column], use_threads=False
    )
    for batch in batches:
        values = batch.column(0)
        yield from values.slice(min(skipped, len(values))).to_pylist()
        skipped = max(0, skipped - len(values))
