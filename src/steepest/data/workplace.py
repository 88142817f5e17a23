"""The folder in which a corpus is prepared: one process, one recipe, nothing half-done."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from steepest import files
from steepest.data.shards import DTYPES, SPLITS, Index, Recipe, is_prepared, map_files
from steepest.data.vocabulary import ABOUT
from steepest.errors import UserError

if TYPE_CHECKING:
    from steepest.data.tokenizers import Tokenizer

LOCK = ".steepest-lock"
SHARD_FILE = rf"({'|'.join(SPLITS)})-\d{{5,}}\.({'|'.join(DTYPES)})"
TEMPORARY = re.compile(rf"\.({SHARD_FILE}|index\.json|tokenizer)\.\w+")
"""Names of files that are being written, as `steepest.files` makes them, and of such a folder."""


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Make the folder if needed, and keep other processes out of it.

    Raises UserError if another process works in it or it can't be written to. If it was made here
    and nothing is in it in the end, it is removed again.
    """
    with files.disk_errors(folder, "; choose another folder."):
        existed = folder.is_dir()
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("a+", encoding="utf-8")
    with lock:
        files.claim(lock, f"prepares a corpus in {folder}", "choose another folder")
        try:
            with files.disk_errors(folder):
                files.sign(lock)
            yield
        finally:
            if not is_prepared(folder):
                (folder / LOCK).unlink(missing_ok=True)
                if not existed:
                    with suppress(OSError):  # something is in it
                        folder.rmdir()


def begin(folder: Path, recipe: Recipe) -> Index:
    """Return the index in the folder, or a new one; remove what a killed process left unfinished.

    Raises UserError if the folder holds a corpus of another recipe or something else, or lacks a
    file that its index names.
    """
    if is_prepared(folder):
        index = Index.read(folder)
        _check_same(folder, index.recipe, recipe)
        for split in SPLITS:
            for kind in DTYPES:
                map_files(folder, index, split, kind)
        discard(folder, TEMPORARY)
        return index
    if strange := sorted(path.name for path in folder.iterdir() if not _is_ours(path)):
        raise UserError(
            f"{folder} is not empty ({strange[0]} is in it) and holds no prepared corpus; "
            "choose another folder."
        )
    discard(folder)
    return Index(recipe)


def keep_tokenizer(tokenizer: Tokenizer, folder: Path) -> Path:
    """Save the tokenizer with the shards, whole or not at all, and return where."""
    place = folder / "tokenizer"
    if not place.exists():
        with files.disk_errors(folder), files.new_folder(place) as temporary:
            tokenizer.save(temporary)
    return place


def discard(folder: Path, names: re.Pattern[str] | None = None) -> None:
    """Remove the files of ours with such names, by default all but the lock."""
    for path in folder.iterdir():
        if path.name == LOCK or not (names.fullmatch(path.name) if names else _is_ours(path)):
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _is_ours(path: Path) -> bool:
    """Return whether a file could be of a preparation that has no index yet."""
    if path.name == "tokenizer":
        return (path / ABOUT).is_file()
    ours = path.name == LOCK or re.fullmatch(SHARD_FILE, path.name)
    return bool(ours or TEMPORARY.fullmatch(path.name))


def _check_same(folder: Path, begun: Recipe, asked: Recipe) -> None:
    """Raise UserError unless the two recipes give the same corpus."""
    for what, was, now in zip(_LABELS, _identity(begun), _identity(asked), strict=True):
        if was != now:
            raise UserError(
                f"{folder} was begun with {what} {was}, not {now}; give the same to continue it, "
                "or choose another folder."
            )


_LABELS = ("corpus", "tokenizer", "shards of", "training tokens", "validation tokens", "held out")


def _identity(recipe: Recipe) -> tuple[str, ...]:
    numbers = (recipe.shard_tokens, recipe.tokens, recipe.validation_tokens)
    return (
        f"{recipe.source} ({recipe.source_fingerprint})",
        f"{recipe.tokenizer} ({recipe.tokenizer_fingerprint})",
        *("as many as there are" if number is None else f"{number:,}" for number in numbers),
        "the corpus's own split" if recipe.held_out is None else f"{recipe.held_out:g}",
    )
