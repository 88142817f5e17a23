"""Loading and splitting corpora."""

from __future__ import annotations

import hashlib
import lzma
from importlib import resources
from pathlib import Path

import pytest

from steepest.data import catalogue
from steepest.data import corpus as corpora
from steepest.data.corpus import Corpus, load_corpus
from steepest.errors import UserError


def test_the_embedded_corpus_is_what_its_entry_says() -> None:
    entry = corpora.embedded()["sotu"]
    packed = resources.files("steepest.data").joinpath("corpora", "sotu.txt.xz").read_bytes()
    text = lzma.decompress(packed)
    assert len(packed) <= 1_300_000
    assert len(text) == entry.bytes
    assert hashlib.sha256(text).hexdigest() == entry.sha256
    corpus = load_corpus("sotu")
    assert len(corpus.documents) == entry.documents
    assert corpus.repeats == 0
    assert "public domain" in corpus.licence


def test_a_damaged_embedded_corpus_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(str(resources.files("steepest.data").joinpath("corpora")))
    (tmp_path / "corpora.toml").write_bytes((folder / "corpora.toml").read_bytes())
    packed = (folder / "sotu.txt.xz").read_bytes()
    monkeypatch.setattr(catalogue, "folder", lambda: tmp_path)
    corpora._load_embedded.cache_clear()
    changed = lzma.decompress(packed).replace(b"freedom", b"Freedom", 1)
    other = lzma.compress(changed, preset=0)
    for content in (other, packed[:5000], b"", packed[:100] + b"x" + packed[101:]):
        (tmp_path / "sotu.txt.xz").write_bytes(content)
        with pytest.raises(UserError, match="'sotu' is damaged"):
            load_corpus("sotu")
    (tmp_path / "sotu.txt.xz").unlink()
    with pytest.raises(UserError, match="'sotu' is damaged"):
        load_corpus("sotu")


def test_the_split_is_whole_documents_spread_over_the_corpus() -> None:
    corpus = load_corpus("sotu")
    training, validation = corpus.split()
    assert sorted(training + validation) == sorted(corpus.documents)
    assert not set(training) & set(validation)
    places = [corpus.documents.index(document) for document in validation]
    assert places == list(range(5, 88, 10))


@pytest.mark.parametrize("count", [2, 3, 5, 6, 10, 11, 16, 26])
def test_any_split_has_both_parts(count: int) -> None:
    documents = tuple(f"document {index}" for index in range(count))
    training, validation = Corpus("x", documents, "").split()
    assert len(training) >= 1
    assert len(validation) == max(1, (count + 4) // 10)
    assert sorted(training + validation) == sorted(documents)


def test_a_folder_is_one_document_per_file_in_order_of_name(tmp_path: Path) -> None:
    for name, text in {"b.txt": "two", "a.txt": "one", "c/d.txt": "three", "e.md": "no"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "empty.txt").write_text(" \n")
    corpus = load_corpus(str(tmp_path))
    assert corpus.documents == ("one", "two", "three")
    assert corpus.name == tmp_path.name


def test_repeated_documents_count_once(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("same\fother\fsame\n\fsame")
    corpus = load_corpus(str(tmp_path / "x.txt"))
    assert corpus.documents == ("same", "other")
    assert corpus.repeats == 2


def test_a_file_without_form_feeds_is_split_at_blank_lines(tmp_path: Path) -> None:
    paragraphs = [f"{index} " + "word " * (30 + 17 * (index % 5)) for index in range(100)]
    text = "\n\n".join(paragraph.strip() for paragraph in paragraphs)
    (tmp_path / "x.txt").write_text(text)
    corpus = load_corpus(str(tmp_path / "x.txt"))
    assert "\n\n".join(corpus.documents) == text
    assert all(2000 <= len(document) < 5000 for document in corpus.documents)
    assert len(corpus.documents) > 5


@pytest.mark.parametrize(
    ("files", "corpus", "words"),
    [
        ({}, "sotuu", "neither an embedded corpus"),
        ({}, "missing/file.txt", "neither an embedded corpus"),
        ({}, ".", "holds no .txt files"),
        ({"a.txt": b"one", "b.txt": b"\xff\xfe"}, ".", "b.txt is not UTF-8 .byte 0."),
        ({"a.txt": b"only one"}, ".", "1 distinct document"),
        ({"a.txt": b""}, "a.txt", "0 distinct document"),
        ({"a.csv": b"1,2"}, "a.csv", "must be a .txt file"),
        ({}, "c4", "steepest data prepare c4"),
    ],
)
def test_unusable_corpora_are_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    files: dict[str, bytes],
    corpus: str,
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=words):
        load_corpus(corpus)
