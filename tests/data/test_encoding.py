"""Tokenizing batches of documents: what is kept, in which order, by how many processes."""

from __future__ import annotations

import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from made_up import ListReader, ListSource, contents, texts

from steepest.data.encoding import HASHES, Chosen, _side_by_side, content_hash, encode
from steepest.data.preparation import prepare
from steepest.data.shards import Index
from steepest.data.sources import open_source
from steepest.data.symbols import ByteTokenizer
from steepest.errors import UserError

BYTES = ByteTokenizer()


def test_documents_are_kept_by_their_hash() -> None:
    documents = texts(200)
    half = HASHES // 2
    low, high = encode(BYTES, documents, Chosen(high=half)), encode(BYTES, documents, Chosen(half))
    assert low.read == high.read == 200
    assert sorted([*low.places, *high.places]) == list(range(200))
    assert 60 < len(low.places) < 140
    for side in (low, high):
        chosen = [documents[place] for place in side.places]
        assert [int(h) for h in side.hashes] == [content_hash(text) for text in chosen]
        assert side.sizes.tolist() == [len(text.encode()) for text in chosen]
        parts = np.split(side.tokens, np.cumsum(side.lengths)[:-1])
        assert [BYTES.decode(part[:-1].tolist()) for part in parts] == chosen
        assert all(part[-1] == BYTES.end for part in parts)


def test_hashes_are_pinned() -> None:
    # The split of every prepared corpus depends on it.
    assert content_hash("") == 0xE3B0C44298FC1C14


def test_selecting_documents() -> None:
    encoded = encode(BYTES, ["one", "", "three"], Chosen())
    some = encoded.select(np.array([True, False, True]))
    assert BYTES.decode(some.tokens[some.tokens != 256].tolist()) == "onethree"
    assert (some.places.tolist(), some.lengths.tolist(), some.read) == ([0, 2], [4, 6], 3)


class Odd(ByteTokenizer):
    """A tokenizer that gives an id too many, or breaks."""

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        if texts == ["break"]:
            raise RuntimeError("unknown character")
        return [np.array([70_000])]


def test_bad_tokenizers_are_named() -> None:
    with pytest.raises(UserError, match="bytes gave the id 70000, but its vocabulary has 257 en"):
        encode(Odd(), ["a"], Chosen())
    with pytest.raises(UserError, match="bytes failed with RuntimeError: unknown character"):
        encode(Odd(), ["break"], Chosen())


WORK = """
import sys
from pathlib import Path
from steepest.data.preparation import prepare
from steepest.data.sources import open_source
from steepest.data.symbols import ByteTokenizer
if __name__ == "__main__":
    prepare(open_source(sys.argv[1]), ByteTokenizer(), Path(sys.argv[2]), workers=2,
            shard_tokens=1_000_000)
"""


@pytest.mark.slow
def test_workers_give_the_same_and_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    with corpus.open("w") as file:
        for text in texts(20_000, longest=100):
            file.write(f'{{"text": "{text}"}}\n')
    script = tmp_path / "work.py"
    script.write_text(WORK)
    command = [sys.executable, str(script), str(corpus), str(tmp_path / "out")]
    process = subprocess.Popen(command, start_new_session=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "out" / "train-00001.hashes").exists():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    while members(process.pid):
        assert time.monotonic() < deadline, "workers outlive the process that started them"
        time.sleep(0.05)
    assert not Index.read(tmp_path / "out").complete
    for folder in ("out", "whole"):
        prepare(open_source(str(corpus)), BYTES, tmp_path / folder, shard_tokens=1_000_000)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_workers_run_ahead_so_far_and_no_further(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steepest.data.encoding._tokenizer", BYTES)
    asked = []

    def batches() -> Iterator[list[str]]:
        for number in range(100):
            asked.append(number)
            yield [f"document {number}"]

    with ThreadPoolExecutor(2) as pool:
        here = partial(encode, BYTES)
        found = _side_by_side(here, pool, 12, batches(), Chosen())
        for taken in range(1, 80):
            next(found)
            assert len(asked) == 11 + taken
        found.close()


def members(group: int) -> list[int]:
    """The processes of a process group that still run."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it ended meanwhile
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def test_memory_stays_flat(tmp_path: Path) -> None:
    class Endless(ListSource):
        fingerprint = "endless"

        def read(self, split: str, state: dict | None = None) -> ListReader:
            class Reader(ListReader):
                def __next__(self) -> str:
                    self.position += 1
                    return f"{self.position} " * 2000

            return Reader((), 0)

    def peak(tokens: int) -> int:
        source = Endless((), ("validation",))
        tracemalloc.start()
        prepare(source, BYTES, tmp_path / str(tokens), tokens=tokens, shard_tokens=4_000_000)
        highest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return highest

    few = peak(6_000_000)
    assert few < 60e6
    assert peak(60_000_000) < few + 2e6
