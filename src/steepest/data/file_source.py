"""A file or a folder of files as a source of documents, with the validation split it may ship."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePath
from typing import Any

from steepest.data.readers import SUFFIXES, TEXT, FileReader
from steepest.errors import UserError

SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}
ENDS_DIGESTED = 2**16  # bytes at the start and at the end of each file


@dataclass(frozen=True)
class FileSource:
    """Documents of local files: `files` by split, under `root`, in the order they are read."""

    name: str
    root: Path
    files: Mapping[str, Sequence[Path]]
    column: str
    licence: str
    description: str

    @property
    def own_validation(self) -> bool:
        """Whether the files themselves say which are for validation."""
        return "validation" in self.files

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits over the column and `digest_of` the files."""
        text = f"files {self.column} {digest_of(self.root, self.files)}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def read(self, split: str, state: dict[str, Any] | None = None) -> FileReader:
        """Return the documents of a split, from `state` on. Raises UserError for an unknown one."""
        if split not in self.files:
            raise UserError(f"Corpus {self.name} has no {split} split of its own.")
        return FileReader(self.files[split], self.column, state)


def digest_of(root: Path, files: Mapping[str, Sequence[Path]]) -> str:
    """Return the SHA-256 over split, path below `root`, size and both ends of each file.

    The ends are 64 KiB each, so that a terabyte takes seconds; times do not count.
    """
    digest = hashlib.sha256()
    for split, members in files.items():
        for file in members:
            path = file.relative_to(root).as_posix()
            digest.update(f"{split} {path} {file.stat().st_size}\n".encode() + _ends(file))
    return digest.hexdigest()


def open_files(path: Path, name: str, text_column: str | None) -> FileSource:
    """Open a file, or every readable file below a folder in the order of their relative paths.

    Where file or folder names tell a training from a validation split (as c4-train... and
    c4-validation... do), those are the splits, and files of a test split are not read. Raises
    UserError when nothing is readable, a file is empty, or such names leave out some files.
    """
    root, files = (path, _below(path)) if path.is_dir() else (path.parent, [path])
    if not files:
        raise UserError(f"Folder {path} holds no file to read: none ends in {', '.join(SUFFIXES)}.")
    if path.is_file() and not path.name.endswith(SUFFIXES):
        raise UserError(f"File {path} cannot be read: it must end in {', '.join(SUFFIXES)}.")
    for file in files:
        if file.stat().st_size == 0:
            raise UserError(f"File {file} is empty; remove it or fetch it again.")
    if text_column is not None and all(file.name.endswith(TEXT) for file in files):
        raise UserError(f"Corpus {path} is plain text and has no column {text_column!r}.")
    splits = _splits(root, files)
    return FileSource(
        name=name,
        root=root,
        files=splits,
        column=text_column or "text",
        licence="licence not stated",
        description=_describe(splits),
    )


def _below(folder: Path) -> list[Path]:
    found = (
        (file.relative_to(folder).as_posix(), file)
        for file in folder.rglob("*")
        if file.name.endswith(SUFFIXES) and file.is_file()
    )
    return [file for path, file in sorted(found) if not _is_hidden(path)]


def _is_hidden(path: str) -> bool:
    return any(part.startswith(".") for part in PurePath(path).parts)


def _splits(root: Path, files: list[Path]) -> dict[str, list[Path]]:
    """Group files by the split that their paths name; all are training files if one lacks."""
    named: dict[str | None, list[Path]] = {}
    for file in files:
        named.setdefault(_split_in(file.relative_to(root)), []).append(file)
    if "train" not in named or "validation" not in named:
        return {"train": files}
    if None in named:
        raise UserError(
            f"Folder {root} holds a training and a validation split, and {named[None][0]}, whose "
            "name says neither; move it away or give it a name with 'train' or 'validation'."
        )
    return {split: named[split] for split in ("train", "validation")}


def _split_in(path: PurePath) -> str | None:
    """Return the split that the path names first, so that a folder decides for its files."""
    words = re.split(r"[^a-z]+", path.as_posix().lower())
    return next((SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS), None)


def _ends(file: Path) -> bytes:
    with file.open("rb") as stream:
        start = stream.read(ENDS_DIGESTED)
        stream.seek(max(0, file.stat().st_size - ENDS_DIGESTED))
        return hashlib.sha256(start + stream.read()).digest()


def _describe(splits: dict[str, list[Path]]) -> str:
    parts = []
    for split, files in splits.items():
        size = sum(file.stat().st_size for file in files) / 1e6
        noun = "file" if len(files) == 1 else "files"
        parts.append(f"{len(files):,} {noun} ({size:,.1f} MB) for {split}")
    return ", ".join(parts)
