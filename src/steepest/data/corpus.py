"""Corpora as lists of documents, and the fixed hold-out of whole documents."""

from __future__ import annotations

import hashlib
import lzma
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from steepest.data import catalogue, text_files
from steepest.data.streams import Place
from steepest.errors import UserError

FORM_FEED = "\f"
HELD_OUT_EVERY = 10
FIRST_HELD_OUT = 5


@dataclass(frozen=True)
class Corpus:
    """Documents in a fixed order, without exact repeats (`repeats` counts those left out)."""

    name: str
    documents: tuple[str, ...]
    licence: str
    repeats: int = 0

    def split(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return (training, validation) documents.

        Document 5, 15, 25, ... is held out whole: spread over the corpus, and the same for every
        seed. Of fewer than 6 documents the last one is held out.
        """
        first = min(FIRST_HELD_OUT, len(self.documents) - 1)
        held_out = self.documents[first::HELD_OUT_EVERY]
        training = [
            document
            for index, document in enumerate(self.documents)
            if index % HELD_OUT_EVERY != first
        ]
        return tuple(training), held_out


def embedded() -> dict[str, catalogue.Entry]:
    """Return the entries of the corpora that come with the package, by name."""
    return {name: entry for name, entry in catalogue.corpora().items() if entry.kind == "embedded"}


def load_corpus(corpus: str) -> Corpus:
    """Load an embedded corpus by name, a .txt file, or a folder of .txt files (one document each).

    A single file is split at form feeds or, having none, at blank lines into passages of at least
    2000 characters. Raises UserError when there is nothing to read, when a file is not UTF-8, when
    fewer than two documents remain (one must be held out), when an embedded corpus is damaged, and
    for the corpora of the catalogue that are too large to hold in memory.
    """
    if corpus in embedded():
        return _load_embedded(corpus)
    if corpus in catalogue.corpora():
        raise UserError(
            f"Corpus {corpus!r} must be made into tokens before it is used: "
            f"`steepest data prepare {corpus}`."
        )
    path = Path(corpus).expanduser()
    if path.is_dir():
        documents = _read_folder(path)
    elif path.is_file():
        documents = _split_file(path)
    else:
        raise UserError(
            f"Corpus {corpus!r} is neither an embedded corpus ({', '.join(embedded())}) "
            "nor an existing .txt file or folder."
        )
    return _corpus_of(path.resolve().name, documents, licence="licence not stated", where=corpus)


@cache
def _load_embedded(name: str) -> Corpus:
    entry = embedded()[name]
    try:
        packed = catalogue.folder().joinpath(f"{name}.txt.xz").read_bytes()
        data = lzma.decompress(packed)
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise _damaged(name, str(error)) from error
    digest = hashlib.sha256(data).hexdigest()
    if digest != entry.sha256:
        raise _damaged(name, f"its SHA-256 is {digest} instead of {entry.sha256}")
    documents = data.decode().split(FORM_FEED)
    return _corpus_of(name, documents, licence=entry.licence, where=name)


def _damaged(name: str, reason: str) -> UserError:
    return UserError(f"The embedded corpus {name!r} is damaged ({reason}); reinstall steepest.")


def _corpus_of(name: str, documents: list[str], *, licence: str, where: str) -> Corpus:
    """Drop empty documents and repeats: a repeat could be trained on and held out at once."""
    filled = [stripped for document in documents if (stripped := document.strip())]
    distinct = tuple(dict.fromkeys(filled))
    if len(distinct) < 2:
        raise UserError(
            f"Corpus {where!r} has {len(distinct)} distinct document(s); at least 2 are needed, "
            "since whole documents are held out for validation."
        )
    return Corpus(name, distinct, licence, repeats=len(filled) - len(distinct))


def _read_folder(folder: Path) -> list[str]:
    files = sorted(folder.rglob("*.txt"), key=lambda file: file.relative_to(folder).as_posix())
    if not files:
        raise UserError(f"Folder {folder} holds no .txt files.")
    return [text for file in files for text in text_files.whole(file, Place())]


def _split_file(file: Path) -> list[str]:
    if file.suffix != ".txt":
        raise UserError(f"Corpus {file} must be a .txt file or a folder of .txt files.")
    return list(text_files.parts(file, Place()))
