"""Datasets in the hub's layouts through `datasets`: documents, splits, continuing, errors."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import hub_layouts as layouts
import huggingface_hub.constants
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from steepest.data import hub
from steepest.data.catalogue import corpora
from steepest.data.hub import HubSource
from steepest.errors import UserError

datasets = pytest.importorskip("datasets")

TRAIN = layouts.texts("train", 23)
VALIDATION = layouts.texts("validation", 5)
SUBSETS = {name: layouts.texts(name, 5) for name in ("arxiv", "book", "cc_2019-30", "github")}

LAYOUTS: dict[str, Callable[[Path], Path]] = {
    "c4": lambda folder: layouts.c4(folder, TRAIN, VALIDATION),
    "fineweb": lambda folder: layouts.fineweb(folder, TRAIN),
    "slimpajama": lambda folder: layouts.slimpajama(folder, TRAIN, VALIDATION),
    "redpajama": lambda folder: layouts.redpajama(folder, SUBSETS),
    "redpajama-v2": lambda folder: layouts.redpajama_v2(folder, TRAIN),
    "arxiv": lambda folder: layouts.proof_pile(folder, TRAIN, VALIDATION),
}
ORDER = {
    "c4": TRAIN[::3] + TRAIN[1::3] + TRAIN[2::3],
    "fineweb": TRAIN,
    "slimpajama": TRAIN[::2] + TRAIN[1::2],
    "redpajama": [text for texts in SUBSETS.values() for text in texts],
    "redpajama-v2": TRAIN[::2] + TRAIN[1::2],
    "arxiv": TRAIN[::2] + TRAIN[1::2],
}


@pytest.fixture(autouse=True)
def _no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def catalogued(name: str, folder: Path) -> HubSource:
    """The source that the catalogue describes, at a folder instead of the hub."""
    entry = corpora()[name]
    return HubSource(
        name=name,
        hub=str(folder),
        config=entry.config,
        column=entry.column,
        files=entry.files,
        articles=entry.articles,
    )


def continues_everywhere(source: HubSource, documents: list[str]) -> None:
    reader = source.read("train")
    states = [reader.state()]
    for _ in documents:
        next(reader)
        states.append(reader.state())
    for done, state in enumerate(json.loads(json.dumps(states))):
        again = source.read("train", state)
        assert again.state() == state
        assert list(again) == documents[done:]


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_documents_of_a_layout(tmp_path: Path, name: str) -> None:
    source = catalogued(name, LAYOUTS[name](tmp_path / name))
    assert list(source.read("train")) == ORDER[name]
    assert source.own_validation == corpora()[name].own_validation
    if source.own_validation:
        assert sorted(source.read("validation")) == sorted(VALIDATION)
    else:
        with pytest.raises(UserError, match=f"{name} has no validation split; it has train"):
            source.read("validation")


@pytest.mark.parametrize("batch", [1, 4, 64])
@pytest.mark.parametrize("name", ["c4", "fineweb", "redpajama"])
def test_reading_continues_behind_every_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, batch: int
) -> None:
    monkeypatch.setattr(hub, "BATCH", batch)
    continues_everywhere(catalogued(name, LAYOUTS[name](tmp_path / name)), ORDER[name])


def article(title: str, sections: int) -> list[str]:
    """The rows of an article: blank ones are empty, others begin with a space."""
    rows = ["", f" = {title} = \n", "", f" {title} is a = b = c . \n", " = not a heading = \n"]
    for section in range(sections):
        rows += ["", f" = = Section {section} = = \n", "", " Its text . \n", " More text . \n"]
        rows += ["", f" = = = Below {section} = = = \n", "", " Text below . \n"]
    return rows


TITLES = ["Valkyria Chronicles III", "E = mc ²", "500", "The Last"]
ARTICLES = [article(title, index) for index, title in enumerate(TITLES)]


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_lines_of_wikitext_become_articles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    monkeypatch.setattr(hub, "BATCH", batch)
    rows = [row for rows in ARTICLES for row in rows]
    folder = layouts.wikitext(tmp_path / "wikitext", rows, article("Held out", 1))
    source = catalogued("wikitext-103", folder)
    documents = list(source.read("train"))
    assert [document.partition("\n")[0] for document in documents] == [
        f" = {title} = " for title in TITLES
    ]
    # Nothing is lost but the blank row in front of the first heading.
    assert "".join(documents) == "".join(row or "\n" for row in rows[1:])
    assert len(list(source.read("validation"))) == 1
    continues_everywhere(source, documents)


def test_only_the_text_column_of_parquet_is_read(tmp_path: Path) -> None:
    folder = layouts.fineweb(tmp_path / "fineweb", TRAIN)
    (file,) = (folder / "sample/100BT").glob("000_*")
    group = pq.ParquetFile(file).metadata.row_group(0)
    columns = [group.column(index) for index in range(group.num_columns)]
    (url,) = (column for column in columns if column.path_in_schema == "url")
    data = bytearray(file.read_bytes())
    start = url.dictionary_page_offset or url.data_page_offset
    data[start : start + url.total_compressed_size] = b"\xff" * url.total_compressed_size
    file.write_bytes(data)
    assert list(catalogued("fineweb", folder).read("train")) == TRAIN


def test_rows_without_text_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    table = pa.table({"text": ["one", None, "", " \n", "two"]})
    pq.write_table(table, tmp_path / "data" / "train-00000-of-00001.parquet")
    source = HubSource("mine", str(tmp_path))
    assert list(source.read("train")) == ["one", "two"]
    continues_everywhere(source, ["one", "two"])


def test_the_fingerprint_follows_the_files_and_what_is_read(tmp_path: Path) -> None:
    folder = layouts.c4(tmp_path / "c4", TRAIN, VALIDATION)
    layouts.c4(tmp_path / "other", TRAIN, VALIDATION, shards=2)
    source = HubSource("c4", str(folder), "en")
    assert source.fingerprint == HubSource("again", str(folder), "en").fingerprint
    others = [
        HubSource("c4", str(tmp_path / "other"), "en"),
        HubSource("c4", str(folder), "en", column="url"),
        HubSource("c4", str(folder), "en", articles=True),
    ]
    assert len({source.fingerprint, *(other.fingerprint for other in others)}) == 4


def test_what_the_hub_does_not_have_is_told(tmp_path: Path) -> None:
    folder = layouts.c4(tmp_path / "c4", TRAIN, VALIDATION)
    fineweb = layouts.fineweb(tmp_path / "fineweb", TRAIN)
    cases = [
        (HubSource("c4", str(folder), "en", column="body"), "'body' in .*are text, timestamp, url"),
        (
            HubSource("fw", str(fineweb), "sample-100BT", column="body"),
            "'body' in .*columns are text, id, dump, url",
        ),
        (HubSource("fw", str(fineweb), "sample-100BT", column="token_count"), "row 1 .* holds int"),
        (HubSource("c4", str(folder), "fr"), "'fr' not found. Available: .'en', 'realnewslike'"),
        (HubSource("c4", str(folder)), "Config name is missing.*'en', 'realnewslike'"),
        (HubSource("x", str(tmp_path / "none")), "x .*cannot be loaded .*Couldn't find any data"),
        (HubSource("x", str(folder), files={"train": "fr/*.jsonl"}), "x holds no rows"),
        (HubSource("x", str(folder), files={"train": "README.md"}), "no valid JSON in row 1 of"),
    ]
    for source, words in cases:
        with pytest.raises(UserError, match=words) as error:
            list(source.read("train"))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", [name for name, e in corpora().items() if e.kind == "hub"])
def test_without_a_network_each_one_says_so(name: str) -> None:
    entry = corpora()[name]
    source = HubSource(name, entry.hub, entry.config, files=entry.files)
    with pytest.raises(UserError, match=f"{name} .*Hugging Face Hub, which cannot be reached"):
        source.read("train")


def test_a_file_that_is_cut_short_is_told(tmp_path: Path) -> None:
    folder = layouts.c4(tmp_path / "c4", TRAIN, VALIDATION)
    shard = folder / "en" / "c4-train.00001-of-01024.json.gz"
    shard.write_bytes(shard.read_bytes()[:-10])
    reader = HubSource("c4", str(folder), "en").read("train")
    with pytest.raises(UserError, match=r"c4 could not be read behind row [0-9]+: Compressed file"):
        list(reader)


def test_columns_may_differ_between_files_read_as_lines(tmp_path: Path) -> None:
    path = tmp_path / "data" / "a.json.gz"
    path.parent.mkdir()
    rows = [{"text": "one", "x": 1}, {"x": {"y": "z"}, "text": "two"}, {"text": None}]
    path.write_bytes(gzip.compress(layouts.lines(rows) + b"\n"))
    source = HubSource("mine", str(tmp_path), files={"train": "data/*.json.gz"})
    assert list(source.read("train")) == ["one", "two"]
