"""Reading files: every format, continuing at every document, flat memory, and damaged input."""

from __future__ import annotations

import gzip
import json
import re
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import documents_in_files as written
import numpy as np
import pyarrow as pa
import pytest

from steepest.data import text_files
from steepest.data.readers import FileReader
from steepest.data.streams import Place
from steepest.errors import UserError

FORMATS = ["a.txt", "a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.json.gz", "a.parquet"]


def continued_everywhere(read: Callable[[dict | None], FileReader]) -> list[str]:
    """The documents, once it is sure that reading continues behind each of them."""
    documents = list(read(None))
    reader = read(None)
    states = [reader.state()]
    for _ in documents:
        next(reader)
        states.append(reader.state())
    for done, state in enumerate(json.loads(json.dumps(states))):
        assert list(read(state)) == documents[done:]
    return documents


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_is_read_as_it_was_written(tmp_path: Path, name: str) -> None:
    file = written.write(tmp_path / name, written.DOCUMENTS)
    assert continued_everywhere(lambda state: FileReader([file], "text", state)) == [*written.READ]


def test_files_of_all_formats_follow_each_other(tmp_path: Path) -> None:
    texts = [f"text {index}" for index in range(21)]
    files = [
        written.write(tmp_path / f"{index}{name}", texts[index * 3 : index * 3 + 3])
        for index, name in enumerate(["a.jsonl", "b.parquet", "c.jsonl.zst", "d.json.gz"])
    ]
    files += [written.write(tmp_path / f"{i}.txt", [texts[i]]) for i in range(12, 21)]
    assert continued_everywhere(lambda state: FileReader(files, "text", state)) == texts


def test_another_column_can_hold_the_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(written.json_lines(["one"], column="raw_content"))
    written.write_parquet(tmp_path / "b.parquet", ["no"], raw_content=pa.array(["two"]))
    reader = FileReader([tmp_path / "a.jsonl", tmp_path / "b.parquet"], "raw_content")
    assert list(reader) == ["one", "two"]


@pytest.mark.parametrize(
    "values",
    [
        pa.array(["a", "b"], pa.large_string()),
        pa.array(["a", "b"]).dictionary_encode(),
    ],
)
def test_parquet_texts_of_other_types(tmp_path: Path, values: pa.Array) -> None:
    written.write_parquet(tmp_path / "a.parquet", ["x", "y"], other=values)
    assert list(FileReader([tmp_path / "a.parquet"], "other")) == ["a", "b"]


def test_null_is_no_document(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": null}\n\n{"text": "one"}\n  \n{"text": "two"}')
    written.write_parquet(tmp_path / "b.parquet", ["", ""], other=pa.array([None, "three"]))
    assert list(FileReader([tmp_path / "a.jsonl"], "text")) == ["one", "two"]
    assert list(FileReader([tmp_path / "b.parquet"], "other")) == ["three"]


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\n')
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbftwo\fthree")
    assert list(FileReader([tmp_path / "a.jsonl"], "text")) == ["one"]
    assert list(FileReader([tmp_path / "b.txt"], "text")) == ["two", "three"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_what_was_read_is_not_touched_again(tmp_path: Path, name: str) -> None:
    texts = [f"{index} " + "y" * 500 for index in range(40)]
    file = written.write(tmp_path / name, texts)
    reader = FileReader([file], "text")
    for _ in range(20):
        next(reader)
    data = bytearray(file.read_bytes())
    data[8:5000] = b"\xff" * 4992
    file.write_bytes(data)
    assert list(FileReader([file], "text", reader.state())) == texts[20:]


def old_passages(text: str) -> list[str]:
    """How a file without form feeds is cut, by a regular expression over all of it."""
    passages: list[str] = []
    pending: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text):
        pending.append(paragraph)
        if sum(map(len, pending)) >= 2000:
            passages.append("\n\n".join(pending))
            pending = []
    if pending and passages:
        passages[-1] = "\n\n".join([passages[-1], *pending])
    return passages or ["\n\n".join(pending)]


def random_text(seed: int) -> str:
    generator = np.random.default_rng(seed)
    pieces = [
        "\n",
        "\n\n",
        " \n",
        "\t",
        "\r\n",
        "\x1c\n",
        "\u2003\n",
        "é" * 300,
        "w " * 700,
        "日 x",
    ]
    return "".join(generator.choice(pieces, generator.integers(1, 60)))


@pytest.mark.parametrize("seed", range(60))
def test_passages_are_those_of_the_whole_text(tmp_path: Path, seed: int) -> None:
    text = random_text(seed)
    file = tmp_path / "a.txt"
    file.write_text(text, encoding="utf-8", newline="")
    expected = [passage.strip() for passage in old_passages(text) if passage.strip()]
    passages = [passage.strip() for passage in text_files.parts(file, Place()) if passage.strip()]
    assert passages == expected
    if text.strip():
        continued_everywhere(lambda state: FileReader([file], "text", state))


def large_lines(count: int) -> Iterator[bytes]:
    # More than a compressor looks back, so that it does not shrink to nothing.
    pool = np.random.default_rng(0).integers(0, 10**6, (2000, 300)).astype(str).tolist()
    texts = [" ".join(words) for words in pool]
    for index in range(count):
        yield json.dumps({"text": texts[index % 2000]}).encode() + b"\n"


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.txt"])
def test_memory_is_flat(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    count = 9_000
    if name.endswith(".gz"):
        with gzip.open(file, "wb", compresslevel=1) as stream:
            stream.writelines(large_lines(count))
    elif name.endswith(".zst"):
        import zstandard

        with file.open("wb") as raw, zstandard.ZstdCompressor().stream_writer(raw) as stream:
            for line in large_lines(count):
                stream.write(line)
    else:
        with file.open("wb") as stream:
            stream.writelines(b"word " * 420 + b"\n\n" for _ in range(count))
    size = 0
    tracemalloc.start()
    for text in FileReader([file], "text"):
        size += len(text)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size > 18_000_000
    assert peak < 3_000_000


def broken(tmp_path: Path, name: str, data: bytes) -> Path:
    (tmp_path / name).write_bytes(data)
    return tmp_path / name


NOISE = np.random.default_rng(0).integers(0, 10**9, (200, 200)).tolist()
LINES = written.json_lines([" ".join(map(str, numbers)) for numbers in NOISE])
GZIP = gzip.compress(LINES, mtime=0)
ZSTD = written.zstandard_compressed(LINES)


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "no valid JSON in line 2 of .*a.jsonl"),
        ("a.jsonl", b'{"url": "a", "body": "b"}\n', "'text' in line 1 of .*columns are url, body"),
        ("a.jsonl", b'{"text": "a"}\n["b"]\n', "one JSON object .*line 2 of .*holds a list"),
        ("a.jsonl", b'{"text": 3}\n', "'text' of line 1 of .*a.jsonl holds int instead of text"),
        ("a.jsonl", b'{"text": "a\\ud800"}\n', "line 1 of .*half a surrogate pair .character 1"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "a.jsonl is not UTF-8 .byte 24"),
        ("a.jsonl", b"\n \n", "a.jsonl holds no rows"),
        ("a.jsonl.gz", gzip.compress(b"", mtime=0), "a.jsonl.gz holds no rows"),
        ("a.jsonl.gz", GZIP[:-900], "a.jsonl.gz is damaged or cut short behind row 1[0-9]+"),
        ("a.jsonl.gz", GZIP[:-4], "a.jsonl.gz is damaged or cut short behind row 1[0-9]+"),
        (
            "a.jsonl.gz",
            GZIP[:-8] + b"12345678",
            "cut short behind row 1[0-9]+ .CRC check failed",
        ),
        ("a.jsonl.gz", LINES, "damaged or cut short behind row 0 .Not a gzipped file"),
        ("a.jsonl.zst", ZSTD[:-300], "a.jsonl.zst is damaged or cut short behind row [0-9]+"),
        (
            "a.jsonl.zst",
            ZSTD[:-1],
            "cut short behind row [0-9]+ .the last frame has no end",
        ),
        ("a.jsonl.zst", LINES, "a.jsonl.zst is damaged or cut short behind row 0"),
        ("a.jsonl.zst", ZSTD[:40] + b"\xff" * 40 + ZSTD[80:], "damaged or cut short"),
        ("a.txt", b"a\fb\xffc", "a.txt is not UTF-8 .byte 3"),
        ("a.txt", b"ab\n\nb\xffc", "a.txt is not UTF-8 .byte 5"),
        ("a.parquet", LINES, "a.parquet is damaged or cut short behind row 0"),
    ],
)
def test_unreadable_files_are_refused(tmp_path: Path, name: str, data: bytes, words: str) -> None:
    file = broken(tmp_path, name, data)
    with pytest.raises(UserError, match=words) as error:
        list(FileReader([file], "text"))
    assert "\n" not in str(error.value)


def test_documents_before_the_damage_are_read(tmp_path: Path) -> None:
    whole = list(FileReader([broken(tmp_path, "a.jsonl.gz", GZIP)], "text"))
    for name, data in {"b.jsonl.gz": GZIP[:-900], "b.jsonl.zst": ZSTD[:-1]}.items():
        reader = FileReader([broken(tmp_path, name, data)], "text")
        read = list(until_error(reader))
        assert read == whole[: len(read)]
        assert len(read) > 100


def until_error(reader: FileReader) -> Iterator[str]:
    with pytest.raises(UserError):
        yield from reader


@pytest.mark.parametrize("cut", [0.3, 0.9])
def test_a_parquet_file_that_is_cut_short(tmp_path: Path, cut: float) -> None:
    written.write_parquet(tmp_path / "a.parquet", [f"text {index}" * 20 for index in range(400)])
    data = (tmp_path / "a.parquet").read_bytes()
    file = broken(tmp_path, "b.parquet", data[: int(len(data) * cut)])
    with pytest.raises(UserError, match=r"b\.parquet is damaged or cut short behind row 0"):
        list(FileReader([file], "text"))


def test_parquet_columns_that_are_no_text(tmp_path: Path) -> None:
    nested = pa.array([["a"], ["b"]])
    written.write_parquet(tmp_path / "a.parquet", ["x", "y"], nested=nested)
    file = tmp_path / "a.parquet"
    with pytest.raises(UserError, match=r"no column 'body' in .*columns are id, text, nested"):
        list(FileReader([file], "body"))
    for column, kind in {"id": "int64", "nested": "list<element: string>"}.items():
        with pytest.raises(UserError, match=f"Column '{column}' of .*is of type {kind} instead"):
            list(FileReader([file], column))


def test_parquet_texts_that_are_not_utf8(tmp_path: Path) -> None:
    data = pa.array([b"good", b"\xff\xfe"]).cast(pa.binary())
    texts = pa.Array.from_buffers(pa.string(), 2, data.buffers())
    written.write_parquet(tmp_path / "a.parquet", ["x", "y"], bad=texts)
    with pytest.raises(UserError, match=r"'bad' of .*a\.parquet is not UTF-8"):
        list(FileReader([tmp_path / "a.parquet"], "bad"))


def test_a_file_that_is_gone_is_named(tmp_path: Path) -> None:
    for name in FORMATS:
        with pytest.raises(UserError, match=re.escape(name)):
            list(FileReader([tmp_path / name], "text"))
