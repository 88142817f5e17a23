"""Preparing a corpus: what is written, whatever the processes and interruptions."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import multiprocessing
import random
import resource
import time
from pathlib import Path

import numpy as np
import pytest
from made_up import ListReader, ListSource, contents, texts

from steepest.data import open_tokens
from steepest.data.preparation import Progress, prepare, training_documents
from steepest.data.shards import Index
from steepest.data.sources import open_source
from steepest.data.symbols import ByteTokenizer, CharacterTokenizer
from steepest.data.verifying import verify
from steepest.errors import UserError

BYTES = ByteTokenizer()
FORK = multiprocessing.get_context("fork")
SMALL = {"shard_tokens": 5_000, "held_out": 0.1}


def decoded(folder: Path, split: str) -> list[str]:
    tokens = getattr(open_tokens(folder), split)
    return [BYTES.decode(tokens.document(n)[:-1].tolist()) for n in range(len(tokens.ends))]


def held_out(text: str, share: float = 0.1) -> bool:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") < share * 2**64


def test_documents_come_back_in_order(tmp_path: Path) -> None:
    documents = texts(300)
    index = prepare(ListSource(documents), BYTES, tmp_path / "out", **SMALL)
    assert decoded(tmp_path / "out", "train") == [t for t in documents if not held_out(t)]
    assert decoded(tmp_path / "out", "validation") == [t for t in documents if held_out(t)]
    assert len(index.splits["train"].shards) > 5
    assert {s.tokens for s in index.splits["train"].shards[:-1]} == {5_000}
    assert verify(tmp_path / "out") == index == Index.read(tmp_path / "out")


def test_the_index_counts(tmp_path: Path) -> None:
    documents = texts(300)
    index = prepare(ListSource(documents), BYTES, tmp_path / "out", **SMALL)
    train = [text for text in documents if not held_out(text)]
    entry = index.splits["train"]
    assert entry.documents == len(train)
    assert entry.bytes == sum(len(text.encode()) for text in train)
    assert entry.tokens == entry.bytes + len(train)
    assert entry.read == 300
    assert entry.left_out == index.splits["validation"].documents == 300 - len(train)
    data = open_tokens(tmp_path / "out")
    assert data.train.bytes_per_token == entry.bytes / entry.tokens
    assert (data.vocab_size, data.end, data.tokenizer) == (257, 256, "bytes")
    assert data.fingerprint == index.fingerprint
    assert index.common_documents == 0


def test_a_corpus_with_its_own_split(tmp_path: Path) -> None:
    documents, validation = texts(100), texts(20, seed=1)
    source = ListSource([*documents[:50], *validation[3:6], *documents[50:]], validation)
    index = prepare(source, BYTES, tmp_path / "out", **SMALL)
    assert decoded(tmp_path / "out", "train") == documents
    assert decoded(tmp_path / "out", "validation") == validation
    assert index.splits["train"].left_out == 3
    assert list(training_documents(source)) == documents


@pytest.mark.parametrize("wanted", [1, 4_999, 5_000, 12_345])
def test_a_split_ends_with_the_document_that_makes_it_full(tmp_path: Path, wanted: int) -> None:
    documents = [text for text in texts(300) if not held_out(text)]
    source = ListSource(documents, texts(3, seed=1))
    index = prepare(source, BYTES, tmp_path / "out", tokens=wanted, **SMALL)
    ends = np.cumsum([len(text.encode()) + 1 for text in documents])
    count = int(np.searchsorted(ends, wanted)) + 1
    assert decoded(tmp_path / "out", "train") == documents[:count]
    assert index.splits["train"].tokens == ends[count - 1] >= wanted
    assert index.splits["train"].read == count
    verify(tmp_path / "out")


def test_validation_does_not_depend_on_training_tokens(tmp_path: Path) -> None:
    source = ListSource(texts(400))
    for tokens in (2_000, 20_000):
        prepare(
            source,
            BYTES,
            tmp_path / str(tokens),
            tokens=tokens,
            validation_tokens=1_000,
            **SMALL,
        )
    few, many = (contents(tmp_path / str(tokens)) for tokens in (2_000, 20_000))
    assert few["validation-00000.tokens"] == many["validation-00000.tokens"]
    assert len(few["validation-00000.tokens"]) >= 2_000


def test_documents_longer_than_shards_and_empty_ones(tmp_path: Path) -> None:
    documents = ["a" * 40, "b", "c" * 9, "d" * 100, "e"]
    validation = ["f" * 30]
    prepare(ListSource(documents, validation), BYTES, tmp_path / "out", shard_tokens=10)
    assert decoded(tmp_path / "out", "train") == documents
    assert (tmp_path / "out" / "train-00001.ends").stat().st_size == 0
    verify(tmp_path / "out")


def test_large_vocabularies_take_32_bits(tmp_path: Path) -> None:
    documents = ["".join(map(chr, range(0x4E00 + n, 0x4E00 + 20_000))) for n in range(2)]
    documents.append("".join(map(chr, range(0x20000, 0x20000 + 60_000))))
    tokenizer = CharacterTokenizer.train(documents)
    prepare(ListSource(documents, ["\u4e00\u5000"]), tokenizer, tmp_path / "out")
    data = open_tokens(tmp_path / "out")
    assert data.train.tokens.dtype == np.uint32
    assert tokenizer.decode(data.train.document(2)[:-1].tolist()) == documents[2]


def test_a_finished_corpus_is_not_made_again(tmp_path: Path) -> None:
    source = ListSource(texts(100))
    index = prepare(source, BYTES, tmp_path / "out", **SMALL)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("[tv]*-*")}
    assert prepare(source, BYTES, tmp_path / "out", **SMALL) == index
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("[tv]*-*")}


class Slow(ListSource):
    """The corpus, a document every two milliseconds."""

    def read(self, split: str, state: dict | None = None) -> ListReader:
        class Reader(ListReader):
            def __next__(self) -> str:
                time.sleep(0.002)
                return super().__next__()

        documents = self.documents if split == "train" else self.validation
        assert documents is not None
        return Reader(documents, state["position"] if state else 0)


@pytest.mark.parametrize("own", [True, False], ids=["own split", "held out"])
def test_killed_at_any_moment_it_continues_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: bool
) -> None:
    monkeypatch.setattr("steepest.data.token_stream.BATCH_DOCUMENTS", 7)
    source = Slow(texts(150), texts(20, seed=1) if own else None)
    arguments = {"shard_tokens": 2_000, "held_out": 0.1, "tokens": 20_000}
    rng = random.Random(own)
    kills, shards = 0, set()

    def written() -> int:
        return len(list((tmp_path / "killed").glob("*.tokens")))

    while True:
        child = FORK.Process(
            target=prepare, args=(source, BYTES, tmp_path / "killed"), kwargs=arguments
        )
        child.start()
        goal = written() + rng.randint(0, 2)
        while child.is_alive() and written() < goal:
            time.sleep(0.001)
        child.join(rng.uniform(0, 0.03))
        if child.exitcode is not None:
            break
        child.kill()
        child.join()
        kills += 1
        if (tmp_path / "killed" / "index.json").exists():
            index = Index.read(tmp_path / "killed")  # never half-written, nor what it names
            shards.add(len(index.splits["train"].shards))
            verify(tmp_path / "killed")
    assert child.exitcode == 0
    assert kills > 2
    assert len(shards) > 2
    monkeypatch.undo()
    prepare(ListSource(source.documents, source.validation), BYTES, tmp_path / "whole", **arguments)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")  # no leftovers either


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"shard_tokens": 4_000}, r"was begun with shards of 5,000, not 4,000; give the same"),
        ({"tokens": 9_000}, r"with training tokens as many as there are, not 9,000"),
        ({"validation_tokens": 9}, r"with validation tokens 2,000,000, not 9"),
        ({"held_out": 0.2}, r"with held out 0.1, not 0.2"),
    ],
)
def test_another_request_is_not_continued(tmp_path: Path, change: dict, words: str) -> None:
    source = ListSource(texts(100))
    prepare(source, BYTES, tmp_path / "out", **SMALL)
    before = contents(tmp_path / "out")
    with pytest.raises(UserError, match=words):
        prepare(source, BYTES, tmp_path / "out", **(SMALL | change))
    assert contents(tmp_path / "out") == before


def test_another_source_or_tokenizer_is_not_continued(tmp_path: Path) -> None:
    documents = texts(100)
    source = ListSource(documents)
    prepare(source, BYTES, tmp_path / "out", **SMALL)
    with pytest.raises(UserError, match=r"with corpus made-up \(\w{16}\), not made-up \(\w{16}\)"):
        prepare(ListSource(documents[1:]), BYTES, tmp_path / "out", **SMALL)
    other = CharacterTokenizer.train(documents)
    with pytest.raises(UserError, match=r"tokenizer bytes \(\w{16}\), not chars \(\w{16}\)"):
        prepare(source, other, tmp_path / "out", **SMALL)


class Broken(ListSource):
    """A corpus whose content its fingerprint doesn't show; it can't be read behind `broken_at`."""

    fingerprint = "same"
    broken_at = 10**9

    def read(self, split: str, state: dict | None = None) -> ListReader:
        reader, broken_at = super().read(split, state), self.broken_at

        class Reader(ListReader):
            def __next__(self) -> str:
                if self.position == broken_at:
                    raise OSError("connection lost")
                return super().__next__()

        return Reader(reader.documents, reader.position)


def test_a_source_that_breaks_or_changes_underneath(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("steepest.data.token_stream.BATCH_DOCUMENTS", 8)
    documents, validation = texts(200), texts(5, seed=1)
    monkeypatch.setattr(Broken, "broken_at", 150)
    with pytest.raises(UserError, match="made-up cannot be read on: connection lost; the same"):
        prepare(Broken(documents, validation), BYTES, tmp_path / "out", shard_tokens=2000)
    verify(tmp_path / "out")
    assert Index.read(tmp_path / "out").splits["train"].position.tokens > 0
    monkeypatch.undo()
    for changed in ([text[:1] for text in documents], documents[:20]):
        with pytest.raises(UserError, match="is not what it was when its preparation began"):
            prepare(Broken(changed, validation), BYTES, tmp_path / "out", shard_tokens=2000)
    prepare(Broken(documents, validation), BYTES, tmp_path / "out", shard_tokens=2000)
    assert decoded(tmp_path / "out", "train") == documents


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (ListSource([]), "made-up has no documents; at least 2 are needed"),
        (ListSource(["a"]), "made-up has one document; at least 2 are needed"),
        (ListSource(["a", "b"], []), "has no documents for validation"),
        (ListSource(["a"] * 40), "None of the 40 documents of made-up falls into the share of 0.1"),
        (ListSource([], ["a"]), "has no documents for train"),
        (ListSource(["9"] * 40), "All 40 documents of made-up are held out; hold out a smaller"),
    ],
)
def test_a_split_without_documents_is_refused(
    tmp_path: Path, source: ListSource, words: str
) -> None:
    with pytest.raises(UserError, match=words):
        prepare(source, BYTES, tmp_path / "out", held_out=0.1)
    assert list(tmp_path.iterdir()) == []


def test_bad_sources_leave_nothing(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"content": "a"}\n')
    with pytest.raises(UserError, match="no column 'text'"):
        prepare(open_source(str(tmp_path / "in.jsonl")), BYTES, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match=r"is not empty \(thesis.tex is in it\)"):
        prepare(ListSource(texts(10)), BYTES, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    for place, words in (
        (tmp_path / "thesis.tex" / "out", "it is not a folder; choose another"),
        (tmp_path / ("x" * 300), "too long; choose another"),
    ):
        with pytest.raises(UserError, match=f"cannot be written to: .*{words}"):
            prepare(ListSource(texts(10)), BYTES, place)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_one_process_at_a_time(tmp_path: Path) -> None:
    source = Slow(texts(100), texts(3, seed=1))
    child = FORK.Process(target=prepare, args=(source, BYTES, tmp_path / "out"))
    child.start()
    while not (tmp_path / "out" / "tokenizer").exists():
        time.sleep(0.005)
    with pytest.raises(UserError, match=rf"Another process \({child.pid} on .* prepares a corpus"):
        prepare(source, BYTES, tmp_path / "out")
    child.join()
    assert child.exitcode == 0
    verify(tmp_path / "out")


@pytest.mark.parametrize("limit", [3_000, 9_000])
def test_a_full_disk_leaves_what_is_complete(tmp_path: Path, limit: int) -> None:
    """Files may not grow beyond `limit` bytes, shards or else the index can't be written."""
    source = ListSource(texts(3000, longest=5), texts(20, seed=1, longest=5))
    arguments = {"shard_tokens": 2_500 if limit > 5_000 else 5_000}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(UserError, match="the file would be larger than allowed here"):
            prepare(source, BYTES, tmp_path / "out", **arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not [path for path in contents(tmp_path / "out") if path.startswith(".")]
    if limit > 5_000:
        verify(tmp_path / "out")
        assert len(Index.read(tmp_path / "out").splits["train"].shards) > 3
    prepare(source, BYTES, tmp_path / "out", **arguments)
    prepare(source, BYTES, tmp_path / "whole", **arguments)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_progress_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steepest.data.preparation.PROGRESS_SECONDS", 0)
    seen: list[Progress] = []
    source = ListSource(texts(5000))
    prepare(source, BYTES, tmp_path / "out", tokens=300_000, on_progress=seen.append)
    assert [progress.split for progress in seen] == sorted(
        (progress.split for progress in seen), reverse=True
    )
    last = seen[-1]
    assert last.wanted == 300_000
    assert 0 < last.tokens <= 310_000
    assert last.documents > 1000
    assert last.tokens_per_second > 0
    assert last.bytes_per_second > last.tokens_per_second / 2
    assert last.seconds_left is not None


def test_a_file_system_without_locks_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(file: object, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.warns(UserWarning, match=r"No locks .*no other process prepares a corpus in"):
        prepare(ListSource(texts(100), texts(3, seed=1)), BYTES, tmp_path / "out")
    verify(tmp_path / "out")
