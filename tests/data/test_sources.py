"""From names to sources: the catalogue, embedded and local corpora, their splits, mixtures."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import documents_in_files as written
import hub_layouts as layouts
import pytest

from steepest.data.catalogue import Entry
from steepest.data.corpus import load_corpus
from steepest.data.download import fetched
from steepest.data.file_source import FileSource, open_files
from steepest.data.hub import HubSource
from steepest.data.sources import MixedSource, Source, corpora, open_source
from steepest.errors import UserError

datasets = pytest.importorskip("datasets")

NAMES = [
    *("sotu", "c4", "fineweb", "fineweb-edu", "slimpajama", "openwebtext2", "redpajama"),
    *("redpajama-v2", "dclm", "wikitext-103", "shakespeare-char", "arxiv", "arxiv+wiki"),
]


def continued_everywhere(source: Source, split: str) -> list[str]:
    """The documents, once it is sure that reading continues behind each of them."""
    documents = list(source.read(split))
    reader = source.read(split)
    for done in range(len(documents) + 1):
        state = json.loads(json.dumps(reader.state()))
        assert list(source.read(split, state)) == documents[done:]
        next(reader, None)
    return documents


def test_the_catalogue_has_every_corpus() -> None:
    assert list(corpora()) == NAMES
    with_validation = {name for name, entry in corpora().items() if entry.own_validation}
    assert with_validation == {
        *("sotu", "c4", "slimpajama", "wikitext-103", "arxiv", "arxiv+wiki"),
    }


@pytest.mark.parametrize("entry", corpora().values(), ids=NAMES)
def test_an_entry_is_complete(entry: Entry) -> None:
    assert all([entry.title, entry.source, entry.licence, entry.layout, entry.note, entry.column])
    assert bool(entry.hub) == (entry.kind == "hub")
    assert bool(entry.url) == (entry.kind == "file")
    assert bool(entry.parts) == (entry.kind == "mix")
    assert set(entry.parts) <= set(NAMES)
    assert len(entry.sha256) == (64 if entry.kind in {"embedded", "file"} else 0)
    if entry.files:
        assert "train" in entry.files
        assert ("validation" in entry.files) == entry.own_validation


@pytest.mark.parametrize("name", [name for name in NAMES if name != "shakespeare-char"])
def test_every_name_opens_without_a_network(name: str) -> None:
    source = open_source(name)
    entry = corpora()[name]
    assert (source.name, source.licence, source.description) == (name, entry.licence, entry.title)
    if isinstance(source, HubSource):
        assert (source.hub, source.config, source.files) == (entry.hub, entry.config, entry.files)
        assert source.column == entry.column


def test_the_embedded_corpus_keeps_its_hold_out() -> None:
    source = open_source("sotu")
    training, validation = load_corpus("sotu").split()
    assert source.own_validation
    assert continued_everywhere(source, "validation") == list(validation)
    assert list(source.read("train")) == list(training)
    with pytest.raises(UserError, match="sotu has no test split"):
        source.read("test")


def test_small_text_is_the_same_through_both_paths(tmp_path: Path) -> None:
    texts = [f"{index} " + "word " * (300 + 170 * (index % 5)) for index in range(20)]
    (tmp_path / "one.txt").write_text("\n\n".join(text.strip() for text in texts))
    written.write(tmp_path / "many" / "b" / "x.txt", ["second"])
    written.write(tmp_path / "many" / "a.txt", ["first"])
    for corpus in (tmp_path / "one.txt", tmp_path / "many"):
        source = open_source(str(corpus))
        assert not source.own_validation
        assert tuple(continued_everywhere(source, "train")) == load_corpus(str(corpus)).documents
        with pytest.raises(UserError, match="no validation split of its own"):
            source.read("validation")


def test_a_folder_is_read_in_the_order_of_its_paths(tmp_path: Path) -> None:
    for index, name in enumerate(["a/z.jsonl", "b.parquet", "c/a.jsonl.zst", "c/b.json.gz"]):
        written.write(tmp_path / name, [f"{index} first", f"{index} second"])
    written.write(tmp_path / ".cache" / "x.jsonl", ["hidden"])
    (tmp_path / "README.md").write_text("no document")
    documents = [f"{index} {which}" for index in range(4) for which in ("first", "second")]
    assert continued_everywhere(open_source(str(tmp_path)), "train") == documents


def test_a_local_copy_of_c4_keeps_its_validation_apart(tmp_path: Path) -> None:
    train, validation = layouts.texts("train", 9), layouts.texts("validation", 4)
    folder = layouts.c4(tmp_path / "c4", train, validation)
    source = open_source(str(folder / "en"))
    assert source.own_validation
    assert sorted(source.read("train")) == sorted(train)
    assert sorted(source.read("validation")) == sorted(validation)
    assert source.description.startswith("3 files (0.0 MB) for train, 2 files")


def test_a_local_copy_of_slimpajama_leaves_its_test_split_out(tmp_path: Path) -> None:
    train, validation = layouts.texts("train", 9), layouts.texts("validation", 4)
    source = open_source(str(layouts.slimpajama(tmp_path / "sp", train, validation)))
    assert sorted(source.read("train")) == sorted(train)
    assert list(source.read("validation")) == validation


def test_a_copy_of_a_dataset_is_read_as_the_dataset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = ["", " = One = \n", "", " Text . \n", "", " = Two = \n", "", " Text . \n"]
    folder = layouts.wikitext(tmp_path / "wikitext", rows, rows)
    source = open_source(f"wikitext-103:{folder}")
    assert (source.name, source.own_validation) == ("wikitext-103", True)
    assert len(list(source.read("train"))) == 2
    moved = layouts.wikitext(tmp_path / "moved", rows, rows)
    assert source.fingerprint == open_source(f"wikitext-103:{moved}").fingerprint
    rows[-1] = " Other . \n"
    changed = layouts.wikitext(tmp_path / "changed", rows, rows)
    assert source.fingerprint != open_source(f"wikitext-103:{changed}").fingerprint
    plain = open_source(f"hf:{folder}:wikitext-2-raw-v1")
    assert list(plain.read("train")) == [" = One = \n", " Text . \n", " = Two = \n", " Text . \n"]


def test_a_text_file_for_each_split_is_cut_into_documents(tmp_path: Path) -> None:
    written.write(tmp_path / "stories-train.txt", ["one", "two"])
    written.write(tmp_path / "stories-valid.txt", ["three", "four"])
    source = open_source(str(tmp_path))
    assert list(source.read("train")) == ["one", "two"]
    assert list(source.read("validation")) == ["three", "four"]
    written.write(tmp_path / "notes.txt", ["no"])
    with pytest.raises(UserError, match=r"a validation split, and .*notes\.txt, whose name says"):
        open_source(str(tmp_path))


def test_names_of_one_split_alone_split_nothing(tmp_path: Path) -> None:
    for name in ("test.jsonl", "validation.jsonl", "a.jsonl"):
        written.write(tmp_path / name, [name])
    assert not open_source(str(tmp_path)).own_validation
    assert len(list(open_source(str(tmp_path)).read("train"))) == 3


def test_the_text_column_can_be_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(written.json_lines(["one"], column="body"))
    written.write(tmp_path / "b.txt", ["two"])
    assert list(open_source(str(tmp_path), text_column="body").read("train")) == ["one", "two"]
    column = open_source("redpajama-v2", text_column="url")
    assert isinstance(column, HubSource)
    assert column.column == "url"


@pytest.mark.parametrize(
    ("corpus", "hub", "config"),
    [
        ("hf:roneneldan/TinyStories", "roneneldan/TinyStories", None),
        ("roneneldan/TinyStories", "roneneldan/TinyStories", None),
        ("hf:Salesforce/wikitext:wikitext-2-raw-v1", "Salesforce/wikitext", "wikitext-2-raw-v1"),
        ("HuggingFaceFW/fineweb-2:fra_Latn", "HuggingFaceFW/fineweb-2", "fra_Latn"),
    ],
)
def test_any_dataset_of_the_hub_can_be_named(corpus: str, hub: str, config: str | None) -> None:
    source = open_source(corpus, text_column="story")
    assert isinstance(source, HubSource)
    assert (source.hub, source.config, source.column) == (hub, config, "story")


@pytest.mark.parametrize(
    ("files", "opened", "words"),
    [
        ({}, ("c5", None), "'c5' is neither a name of the catalogue .did you mean 'c4'"),
        (
            {},
            ("nothing like it at all", None),
            "catalogue .sotu, c4, fineweb.* nor an existing file",
        ),
        ({}, ("data/train.jsonl", None), "'data/train.jsonl' is neither"),
        ({}, ("long" * 99, None), "longlong' is neither a name"),
        ({"a.txt": b"a"}, ("", None), "Corpus '' is neither a name"),
        ({"a.csv": b"1"}, (".", None), "holds no file to read: none ends in .txt, .jsonl"),
        ({"a.csv": b"1"}, ("a.csv", None), "a.csv cannot be read: it must end in .txt, .jsonl"),
        ({"a.jsonl": b"{}", "b.parquet": b""}, (".", None), "b.parquet is empty; remove it"),
        ({"a.jsonl.gz": b""}, ("a.jsonl.gz", None), "a.jsonl.gz is empty"),
        ({"a.txt": b"x"}, ("a.txt", "body"), "a.txt is plain text and has no column 'body'"),
        ({}, ("sotu", "body"), "sotu has no choice of columns, so no 'body'"),
        ({}, ("arxiv+wiki", "body"), "no choice of columns"),
        ({}, ("c4:nowhere", None), "no copy of corpus c4 at nowhere"),
        ({"a.txt": b"x"}, ("sotu:a.txt", None), "sotu cannot be read from a.txt: give its name"),
    ],
)
def test_what_cannot_be_opened_is_told(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    files: dict[str, bytes],
    opened: tuple[str, str | None],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=words) as error:
        open_source(opened[0], text_column=opened[1])
    assert "\n" not in str(error.value)


def test_the_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    def made(folder: str, names: list[str], text: str, column: str | None = None) -> str:
        for name in names:
            written.write(tmp_path / folder / name, [text, "x" * 200_000])
        return open_source(str(tmp_path / folder), text_column=column).fingerprint

    first = made("a", ["a.jsonl", "b.jsonl"], "text")
    assert len(first) == 16
    assert first == made("moved", ["a.jsonl", "b.jsonl"], "text")
    others = [
        made("b", ["a.jsonl", "c.jsonl"], "text"),
        made("c", ["a.jsonl"], "text"),
        made("d", ["a.jsonl", "b.jsonl"], "text", "body"),
        made("e", ["a.jsonl", "b.jsonl"], "taxt"),
        made("f", ["a.jsonl", "b.jsonl"], "text longer"),
    ]
    assert len({first, *others, open_source("sotu").fingerprint}) == 7


def mixed(tmp_path: Path, *counts: int, own_validation: bool = True) -> MixedSource:
    parts = []
    for index, count in enumerate(counts):
        folder = tmp_path / f"part{index}"
        written.write(folder / "train.jsonl", [f"{index}.{number}" for number in range(count)])
        if own_validation or index == 0:
            written.write(folder / "val.parquet", [f"{index} held out"])
        parts.append(open_files(folder, f"part{index}", None))
    return MixedSource("mix", parts, "licences", "a mix")


def test_a_mix_takes_documents_in_turn(tmp_path: Path) -> None:
    source = mixed(tmp_path, 2, 5, 3)
    expected = ["0.0", "1.0", "2.0", "0.1", "1.1", "2.1", "1.2", "2.2", "1.3", "1.4"]
    assert continued_everywhere(source, "train") == expected
    assert list(source.read("validation")) == ["0 held out", "1 held out", "2 held out"]
    assert source.fingerprint != mixed(tmp_path / "other", 2, 5, 4).fingerprint


def test_a_mix_has_a_validation_split_if_all_parts_have(tmp_path: Path) -> None:
    source = mixed(tmp_path, 2, 2, own_validation=False)
    assert not source.own_validation
    with pytest.raises(UserError, match="mix has no validation split in all of its parts"):
        source.read("validation")


def test_a_file_is_fetched_once_and_checked(tmp_path: Path) -> None:
    data = b"First Citizen:\nBefore we proceed any further, hear me speak.\n"
    (tmp_path / "input.txt").write_bytes(data)
    url, digest = (tmp_path / "input.txt").as_uri(), hashlib.sha256(data).hexdigest()
    file = tmp_path / "cache" / "shakespeare.txt"
    with pytest.raises(UserError, match=r"input\.txt is not the file that is meant: its SHA-256"):
        fetched(url, file, "0" * 64)
    assert not file.exists()
    assert fetched(url, file, digest).read_bytes() == data
    (tmp_path / "input.txt").unlink()
    assert fetched(url, file, digest).read_bytes() == data
    with pytest.raises(UserError, match=r"shakespeare\.txt is not the file that is meant"):
        fetched(url, file, "0" * 64)
    file.unlink()
    with pytest.raises(UserError, match=f"cannot be fetched .*put it at {file}"):
        fetched(url, file, digest)


def test_shakespeare_is_read_from_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STEEPEST_CACHE", str(tmp_path))
    file = tmp_path / "corpora" / "shakespeare-char.txt"
    file.parent.mkdir()
    file.write_text("First Citizen:\nnot what Karpathy has\n")
    with pytest.raises(UserError, match=r"shakespeare-char\.txt is not the file that is meant"):
        open_source("shakespeare-char")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    entry = corpora()["shakespeare-char"]
    catalogue = {entry.name: Entry(**{**vars(entry), "sha256": digest})}
    monkeypatch.setattr("steepest.data.sources.corpora", lambda: catalogue)
    source = open_source("shakespeare-char")
    assert isinstance(source, FileSource)
    assert (source.name, source.licence) == ("shakespeare-char", "public domain")
    assert list(source.read("train")) == ["First Citizen:\nnot what Karpathy has\n"]
    copy = tmp_path / "input.txt"
    copy.write_bytes(file.read_bytes())
    assert list(open_source(f"shakespeare-char:{copy}").read("train")) == list(source.read("train"))
