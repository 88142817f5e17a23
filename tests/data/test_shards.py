"""Shards: arrays in parts, the index, and what verifying finds."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from made_up import ListSource, split_of, texts

from steepest.data import open_tokens
from steepest.data.preparation import prepare
from steepest.data.shards import Index
from steepest.data.splits import ShardedArray
from steepest.data.symbols import ByteTokenizer, CharacterTokenizer
from steepest.data.verifying import verify
from steepest.errors import UserError

SOURCE = ListSource(texts(300))
ARGUMENTS = {"held_out": 0.1, "shard_tokens": 9_000}
WHOLE = np.arange(100, dtype=np.uint16) * 3
CUTS = [(), (50,), (0, 1, 1, 40, 99, 100)]


@pytest.fixture(params=CUTS, ids=str)
def array(request: pytest.FixtureRequest) -> ShardedArray:
    return ShardedArray(np.split(WHOLE, request.param))


def test_a_sharded_array_is_the_whole_one(array: ShardedArray) -> None:
    assert len(array) == 100
    assert array.dtype == np.uint16
    for start in (0, 1, 39, 40, 98, 100, -3):
        for stop in (0, 1, 41, 50, 99, 100, 200, None):
            assert np.array_equal(array[start:stop], WHOLE[start:stop])
    assert [int(array[i]) for i in (0, 1, 39, 40, 99, -1)] == [0, 3, 117, 120, 297, 297]
    index = np.random.default_rng(0).integers(0, 100, (7, 5))
    assert np.array_equal(array[index], WHOLE[index])
    with pytest.raises(IndexError):
        array[100]


@pytest.mark.parametrize("length", [1, 2, 45, 100])
def test_windows_cross_the_borders_of_shards(array: ShardedArray, length: int) -> None:
    starts = np.random.default_rng(0).permutation(101 - length)
    expected = WHOLE[starts[:, None] + np.arange(length)]
    assert np.array_equal(array.windows(starts, length), expected)


def test_counts_are_those_of_the_whole(array: ShardedArray) -> None:
    values = np.arange(-2, 310)
    assert np.array_equal(array.count_up_to(values), np.searchsorted(WHOLE, values, side="right"))


def test_an_empty_array(array: ShardedArray) -> None:
    empty = ShardedArray([np.empty(0, np.int64)])
    assert len(empty) == len(empty[:]) == len(empty[3:5]) == 0
    assert empty.count_up_to(np.array([-1, 5])).tolist() == [0, 0]


def test_only_what_is_asked_for_is_read(tmp_path: Path) -> None:
    shard = np.memmap(tmp_path / "shard", np.uint16, mode="w+", shape=(10**9,))  # sparse
    array = ShardedArray([shard, shard])
    assert array.windows(np.array([5, 10**9 - 2, 2 * 10**9 - 9]), 4).tolist() == [[0] * 4] * 3
    with pytest.raises(ValueError, match="read-only"):
        ShardedArray([np.memmap(tmp_path / "shard", np.uint16, mode="r")])[3:5][0] = 1


def test_documents_of_a_split() -> None:
    split = split_of([3, 1, 4], parts=(2, 5))
    assert [split.document(n).tolist() for n in range(3)] == [
        [1000, 1001, 999],
        [999],
        [1004, 1005, 1006, 999],
    ]
    assert split.bytes_per_token == 3


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared") / "corpus"
    prepare(SOURCE, ByteTokenizer(), folder, **ARGUMENTS)
    return folder


@pytest.fixture
def copied(prepared: Path, tmp_path: Path) -> Path:
    shutil.copytree(prepared, tmp_path / "copy")
    return tmp_path / "copy"


def test_the_index_is_read_back(prepared: Path, tmp_path: Path) -> None:
    index = Index.read(prepared)
    index.write(tmp_path)
    assert Index.read(tmp_path) == index
    assert (tmp_path / "index.json").read_bytes() == (prepared / "index.json").read_bytes()


@pytest.mark.parametrize("suffix", ["tokens", "ends", "hashes"])
def test_verifying_finds_a_flipped_bit(copied: Path, suffix: str) -> None:
    verify(copied)
    path = copied / f"train-00001.{suffix}"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    open_tokens(copied)  # too much to read every time
    with pytest.raises(UserError, match=rf"train-00001.{suffix} is damaged: its SHA-256 is \w+ in"):
        verify(copied)


@pytest.mark.parametrize("suffix", ["tokens", "ends"])
def test_opening_finds_what_is_missing_or_cut_short(copied: Path, suffix: str) -> None:
    path = copied / f"validation-00000.{suffix}"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=rf"00000.{suffix} has [\d,]+ bytes instead of [\d,]+; res"):
        open_tokens(copied)
    path.unlink()
    with pytest.raises(UserError, match=rf"00000.{suffix} is missing; it should have [\d,]+; rest"):
        open_tokens(copied)
    with pytest.raises(UserError, match=r"00000.\w+ (cannot be read|is missing)"):
        verify(copied)
    with pytest.raises(UserError, match=rf"00000.{suffix} is missing; .*, into another folder"):
        prepare(SOURCE, ByteTokenizer(), copied, **ARGUMENTS)  # no word of all being there


def test_another_tokenizer_is_noticed(copied: Path) -> None:
    shutil.rmtree(copied / "tokenizer")
    CharacterTokenizer("abc").save(copied / "tokenizer")
    with pytest.raises(UserError, match=r"\(chars, \w{16}\) is not the one that made the shards"):
        verify(copied)


def rewrite(folder: Path, split: str, **changes: object) -> None:
    index = Index.read(folder)
    index.with_split(split, dataclasses.replace(index.splits[split], **changes)).write(folder)


def test_verifying_checks_the_fingerprint(copied: Path) -> None:
    dataclasses.replace(Index.read(copied), fingerprint="0" * 16).write(copied)
    with pytest.raises(UserError, match=r"the fingerprint in index\.json is not that of its docum"):
        verify(copied)


def test_verifying_checks_where_documents_end(copied: Path) -> None:
    shards = Index.read(copied).splits["train"].shards
    rewrite(copied, "train", shards=(*shards[1:-1], shards[0], shards[-1]))
    with pytest.raises(UserError, match="SHA-256"):
        verify(copied)
    rewrite(copied, "train", shards=shards[:-1])
    with pytest.raises(UserError, match="the last tokens of train belong to no document"):
        verify(copied)


def test_an_incomplete_corpus_is_not_trained_on(copied: Path) -> None:
    dataclasses.replace(Index.read(copied), fingerprint="").write(copied)
    with pytest.raises(UserError, match=r"is not complete; give the `steepest data prepare` that"):
        open_tokens(copied)


def test_a_folder_without_an_index_is_no_corpus(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UserError, match=r"is not a prepared corpus: it has no index\.json"):
            open_tokens(folder)


@pytest.mark.parametrize("damage", ["cut", "key", "format", "list"])
def test_a_damaged_index_is_refused(copied: Path, damage: str) -> None:
    path = copied / "index.json"
    content = json.loads(path.read_text())
    if damage == "cut":
        path.write_text(path.read_text()[:100])
    elif damage == "key":
        del content["recipe"]["vocab_size"]
        path.write_text(json.dumps(content))
    elif damage == "format":
        path.write_text(json.dumps(content | {"format": 2}))
    else:
        path.write_text("[]")
    with pytest.raises(UserError, match=r"index\.json (cannot be read|is damaged or of another)"):
        open_tokens(copied)
