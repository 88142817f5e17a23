"""Datasets of the Hugging Face Hub as sources of documents, streamed through `datasets`."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from steepest.data.file_source import digest_of
from steepest.data.readers import checked_text, missing_column, text_of
from steepest.data.streams import required
from steepest.errors import UserError

ID = re.compile(r"[\w.-]+/[\w.-]+")
ARTICLE_HEADING = re.compile(r" = (?!= ).*(?<! =) = \n?")
UNREACHABLE = re.compile("Connect|Timeout|Offline")  # in names of errors, of several packages
BATCH = 64  # rows taken from `datasets` at once, which is several times faster than one by one
MAX_REASON = 300  # characters of an error of `datasets` that are worth showing


@dataclass(frozen=True)
class HubSource:
    """A dataset by its id on the hub, or a folder laid out as one.

    `files` (split -> pattern in the repository) names JSON lines that are read line by line, for
    repositories whose files differ in columns or that relied on a loading script. `articles` joins
    rows, which are lines, to articles. `own_validation` and `fingerprint` ask the hub; all raise
    UserError when it does not answer.
    """

    name: str
    hub: str
    config: str | None = None
    column: str = "text"
    files: Mapping[str, str] = field(default_factory=dict)
    articles: bool = False
    licence: str = "licence not stated"
    description: str = "a dataset of the Hugging Face Hub"

    @cached_property
    def own_validation(self) -> bool:
        """Whether the dataset has a split of the name `validation`."""
        return "validation" in self._splits

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits over what is read and the commit, of a local copy over its files."""
        read = [self.config, self.column, dict(self.files), self.articles]
        where = digest_of(self._folder, self._local_files()) if self._folder else self.hub
        commit = None if self._folder else self._builder.hash
        return hashlib.sha256(json.dumps([*read, where, commit]).encode()).hexdigest()[:16]

    def read(self, split: str, state: dict[str, Any] | None = None) -> HubReader:
        """Return the documents of a split, from `state` on.

        Raises UserError for a split or a column that is not there.
        """
        if split not in self._splits:
            raise UserError(
                f"Corpus {self.name} has no {split} split; it has {', '.join(self._splits)}."
            )
        return HubReader(self, self._rows(split), state)

    @property
    def row_column(self) -> str:
        """The column of a row that `datasets` gives: of JSON lines read as text, its only one."""
        return "text" if self.files else self.column

    @property
    def _splits(self) -> list[str]:
        return [str(split) for split in self._builder.config.data_files]

    @cached_property
    def _folder(self) -> Path | None:
        folder = Path(self.hub).expanduser()
        return folder.resolve() if folder.is_dir() else None

    def _local_files(self) -> dict[str, list[Path]]:
        data_files = self._builder.config.data_files
        return {str(split): [Path(file) for file in files] for split, files in data_files.items()}

    @cached_property
    def _builder(self) -> Any:
        datasets = required("datasets", f"Corpus {self.name}")
        try:
            if self.files:
                return datasets.load_dataset_builder("text", data_files=self._urls())
            return datasets.load_dataset_builder(str(self._folder or self.hub), self.config)
        except Exception as error:
            raise self._not_loaded(error) from error

    def _urls(self) -> dict[str, str]:
        base = self._folder or f"hf://datasets/{self.hub}"
        return {split: f"{base}/{pattern}" for split, pattern in self.files.items()}

    def _rows(self, split: str) -> Any:
        """Return the rows of a split as an `IterableDataset` of the text column alone."""
        try:
            rows = self._builder.as_streaming_dataset(split)
            if self.files:
                return rows
            if rows.column_names is not None and self.column not in rows.column_names:
                raise missing_column(self.column, rows.column_names, f"corpus {self.name}")
            if hasattr(self._builder.config, "columns"):
                # Parquet: only this column's bytes are fetched.
                self._builder.config.columns = [self.column]
                rows = self._builder.as_streaming_dataset(split)
            return rows.select_columns([self.column])
        except UserError:
            raise
        except Exception as error:
            raise self._not_loaded(error) from error

    def _not_loaded(self, error: Exception) -> UserError:
        if isinstance(error, ConnectionError) or UNREACHABLE.search(type(error).__name__):
            return UserError(
                f"Corpus {self.name} ({self.hub}) needs the Hugging Face Hub, which cannot be "
                f"reached ({_reason(error)}); without a network read a copy, NAME:FOLDER for a "
                "name of the catalogue or else hf:FOLDER."
            )
        return UserError(
            f"Corpus {self.name} ({self.hub}{f', {self.config}' if self.config else ''}) cannot "
            f"be loaded from the Hugging Face Hub: {_reason(error)}"
        )


class HubReader:
    """The documents of one split of a dataset; an iterator with a position.

    Rows whose text is null or blank are left out. Memory holds one chunk of a file (10 MB of JSON,
    a row group of Parquet). Continuing reads the file where it stopped from its start, without
    handing out what came before. Raises UserError, naming the row, for what cannot be read.
    """

    def __init__(self, source: HubSource, rows: Any, state: dict[str, Any] | None) -> None:
        state = state or {"batch": None, "used": 0, "row": 0, "lines": []}
        self._source = source
        self._rows = rows.with_format("arrow")
        self._batch = state["batch"]
        self._used = state["used"]
        self._row = state["row"]
        self._lines = list(state["lines"])
        if self._batch is not None:
            self._rows.load_state_dict(self._batch)
        self._texts = self._read()
        self._documents = self._articles() if source.articles else self._texts

    def __iter__(self) -> HubReader:
        return self

    def __next__(self) -> str:
        while not (text := next(self._documents)) or text.isspace():
            pass
        return text

    def state(self) -> dict[str, Any]:
        """Return the position behind the last document.

        `batch` is where `datasets` was before the current batch, of which `used` rows are done;
        `row` counts for messages; `lines` are rows that were read and belong to the next article.
        """
        return {
            "batch": self._batch,
            "used": self._used,
            "row": self._row,
            "lines": list(self._lines),
        }

    def _read(self) -> Iterator[str]:
        batches = self._rows.iter(BATCH)
        while (values := self._next_values(batches)) is not None:
            for value in values[self._used :]:
                self._used += 1
                self._row += 1
                yield self._text(value) or ""
            self._batch = self._rows.state_dict()
            self._used = 0
        if self._row == 0:
            raise UserError(f"Corpus {self._source.name} holds no rows in this split.")

    def _next_values(self, batches: Iterator[Any]) -> list[object] | None:
        try:
            if (batch := next(batches, None)) is None:
                return None
            values: list[object] = batch.column(self._source.row_column).to_pylist()
            return values
        except Exception as error:
            raise UserError(
                f"Corpus {self._source.name} could not be read behind row {self._row:,}: "
                f"{_reason(error)}"
            ) from error

    def _text(self, value: object) -> str | None:
        column = self._source.column
        where = f"row {self._row:,} of corpus {self._source.name}"
        if self._source.files:
            line = str(value)
            return text_of(line, column, where) if line and not line.isspace() else None
        return checked_text(value, column, where)

    def _articles(self) -> Iterator[str]:
        """Join lines to articles: one begins at a heading of the first level with blank lines
        around it, so the blank line behind shows that the line before began the next article.
        """
        for line in self._texts:
            blank = not line or line.isspace()
            if blank and _ends_in_heading(self._lines):
                *article, heading = self._lines
                self._lines = [heading, line]
                if article:
                    yield _joined(article)
            else:
                self._lines.append(line)
        article, self._lines = self._lines, []
        yield _joined(article)


def _ends_in_heading(lines: list[str]) -> bool:
    """Whether the last line is a heading of the first level, behind a blank line or nothing."""
    if not lines or not ARTICLE_HEADING.fullmatch(lines[-1]):
        return False
    return len(lines) == 1 or not lines[-2] or lines[-2].isspace()


def _joined(lines: list[str]) -> str:
    return "".join(line if line.endswith("\n") else f"{line}\n" for line in lines)


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= MAX_REASON else f"{text[:MAX_REASON]}..."
