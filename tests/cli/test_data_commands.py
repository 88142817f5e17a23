"""`steepest data` as a person meets it."""

from __future__ import annotations

import gzip
import io
import json
import random
import sys
from pathlib import Path

import pytest
from rich.console import Console

from steepest import cli
from steepest.cli.data import LivePreparation, count, progress_line
from steepest.cli.train import read as read_run
from steepest.data import open_tokens
from steepest.data.preparation import Progress
from steepest.data.symbols import ByteTokenizer
from steepest.errors import UserError


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["steepest", "data", *arguments])
    try:
        cli.main()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0
    return 0


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with corpora good and bad, and a good one's path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    rng = random.Random(0)
    lines = [
        json.dumps({"text": f"{n}: " + " ".join(rng.choices("abcdefgh", k=50))}) for n in range(400)
    ]
    Path("good.jsonl").write_text("\n".join(lines))
    Path("empty.jsonl").write_text("")
    Path("one.txt").write_text("alone")
    packed = gzip.compress("\n".join(lines * 9).encode())
    Path("broken.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    return tmp_path / "good.jsonl"


BYTES = ByteTokenizer()

WRONG = [
    (("insect",), "did you mean 'inspect'?"),
    (("prepare", "c44", "--out", "out"), "did you mean 'c4'?"),
    (("prepare", "good.jsonl", "--out", "out", "--tokenizer", "gpt3"), "did you mean 'gpt2'?"),
    (("prepare", "good.jsonl", "--out", "out", "--tokens", "5x"), "--tokens must be a number such"),
    (
        ("prepare", "good.jsonl", "--out", "out", "--tokens", "0"),
        "500k, 10M or 1B, not '0'",
    ),
    (("prepare", "good.jsonl", "--out", "out", "--held-out", "1.5"), "between 0 and 1, not 1.5"),
    (("prepare", "good.jsonl", "--out", "out", "--workers", "0"), "workers must be at least 1"),
    (("prepare", "good.jsonl", "--out", "out", "--text-colum", "a"), "'--text-column'"),
    (("prepare", "good.jsonl", "--out", "out", "--text-column", "content"), "its columns are text"),
    (("prepare", "good.jsonl", "--out", "good.jsonl"), "cannot be written to: it is not a folder"),
    (("prepare", "good.jsonl", "--out", "."), "is not empty (broken.jsonl.gz is in it)"),
    (("prepare", "empty.jsonl", "--out", "out"), "empty.jsonl"),
    (("prepare", "broken.jsonl.gz", "--out", "out"), "broken.jsonl.gz"),
    (("prepare", "one.txt", "--out", "out"), "one.txt has one document; at least 2 are needed"),
    (("prepare", "good.jsonl", "--out", "out", "--tokenizer", "bpe"), "'bpe' needs a vocabulary"),
    (("prepare", "good.jsonl", "--out", "out", "--tokenizer", "bpe-0"), "at least 257"),
    (("prepare", "", "--out", "out"), "Corpus '' is neither a name of the catalogue"),
    (("inspect", "out"), "is not a prepared corpus"),
    (("inspect", ".", "--sample", "-1"), "--sample must not be negative"),
]


@pytest.mark.parametrize(("arguments", "right"), WRONG)
def test_wrong_input_is_one_sentence_and_leaves_nothing(
    arguments: tuple[str, ...],
    right: str,
    corpus: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = sorted(corpus.parent.rglob("*"))
    if arguments[0] == "prepare" and "--tokenizer" not in arguments:
        arguments = (*arguments, "--tokenizer", "bytes")
    assert run(monkeypatch, *arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    message = printed.err.strip()
    assert message.startswith("steepest: ")
    assert right in message
    assert "\n" not in message
    assert sorted(corpus.parent.rglob("*")) == before


def test_prepare_and_inspect(
    corpus: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["prepare", "good.jsonl", "--tokenizer", "bytes", "--held_out", "0.1"]
    command += ["--tokens", "20k", "--shard-tokens", "5_000", "--out", "out", "--workers", "1"]
    assert run(monkeypatch, *command) == 0
    printed = capsys.readouterr().out
    data = open_tokens(Path("out"))
    assert len(data.train) >= 20_000
    assert f"{len(data.train):,}" in printed
    assert f"{len(data.validation.ends):,}" in printed
    assert "out" in printed
    assert run(monkeypatch, *command) == 0  # there is nothing left to do
    assert capsys.readouterr().out == printed
    assert run(monkeypatch, "inspect", "out", "--sample", "2") == 0
    printed = capsys.readouterr().out
    assert data.fingerprint in printed
    assert "no training document is a validation document" in printed
    assert "Training document 0 (" in printed
    assert f"Training document {len(data.train.ends) // 2:,} (" in printed
    sample = BYTES.decode(data.train.document(0)[:-1].tolist())
    assert sample in printed


def test_a_corpus_that_is_shorter_than_asked_for(
    corpus: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["prepare", "good.jsonl", "--tokenizer", "bytes", "--tokens", "1B", "--out", "out"]
    assert run(monkeypatch, *command, "--held-out", "0.1") == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "has no more than these of the 1,000,000,000 tokens asked for" in printed


def test_a_trained_tokenizer_is_made_once(
    corpus: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["prepare", "good.jsonl", "--tokenizer", "bpe-270", "--out", "out"]
    command += ["--held-out", "0.1"]
    assert run(monkeypatch, *command) == 0
    assert "Reading the training documents to make the tokenizer" in capsys.readouterr().out
    assert open_tokens(Path("out")).vocab_size == 270
    assert run(monkeypatch, *command) == 0
    assert "Reading the training documents" not in capsys.readouterr().out


def test_a_run_takes_the_vocabulary_of_a_prepared_folder(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["prepare", "good.jsonl", "--tokenizer", "bytes", "--out", "out"]
    assert run(monkeypatch, *command, "--held-out", "0.1") == 0
    for arguments in (["--model", "llama-9m", "--data", "out"], ["--data=out"]):
        config, _ = read_run(arguments)
        assert (config.data.corpus, config.data.vocab_size) == ("out", 257)
        assert config.model.vocab_size > 257
    config, _ = read_run(["--data", "out", "--model.vocab-size", "257"])
    assert config.model.vocab_size == 257
    with pytest.raises(UserError, match=r"is 256, smaller than .* set model\.vocab_size to 257 or"):
        read_run(["--data", "out", "--model.vocab-size", "256"])


def test_a_damaged_shard_is_named(
    corpus: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["prepare", "good.jsonl", "--tokenizer", "bytes", "--out", "out"]
    assert run(monkeypatch, *command, "--held-out", "0.1") == 0
    path = Path("out/train-00000.tokens")
    path.write_bytes(b"\1" + path.read_bytes()[1:])
    capsys.readouterr()
    assert run(monkeypatch, "inspect", "out") == 2
    message = capsys.readouterr().err
    assert "train-00000.tokens is damaged: its SHA-256 is" in message


def test_the_list_names_corpora_and_tokenizers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert run(monkeypatch, "list") == 0
    printed = capsys.readouterr().out
    for name in ("sotu", "c4", "fineweb-edu", "wikitext-103", "gpt2", "llama2", "t5", "bpe-N"):
        assert name in printed
    assert "ODC-By" in printed
    assert run(monkeypatch) == 0
    assert "steepest data inspect" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["prepare", "list", "inspect"])
def test_every_command_has_help(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, name, "--help") == 0
    assert f"steepest data {name}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("500k", 500_000),
        ("10M", 10**7),
        ("1B", 10**9),
        ("1.5b", 1_500_000_000),
        ("2_000_000", 2_000_000),
        ("1,024", 1024),
        ("7", 7),
        ("1T", 10**12),
        ("9_007_199_254_740_993", 2**53 + 1),
    ],
)
def test_numbers_may_have_units(text: str, number: int) -> None:
    assert count("--tokens", text) == number


@pytest.mark.parametrize("text", ["", "k", "1e9", "-5", "1.5", "10 MB", "1..5k", "0.1", "nan"])
def test_other_numbers_are_refused(text: str) -> None:
    if text == "1.5":
        assert count("--tokens", text) == 2
        return
    with pytest.raises(UserError, match="--tokens must be a number such as 500k, 10M or 1B"):
        count("--tokens", text)


def test_progress_is_told() -> None:
    progress = Progress("train", 61_000, 250_000_000, 10**9, 5.2e6, 23.4e6, 144.2)
    line = "250 M of 1.00 B tokens, 61.0 k documents read, 5.20 M tokens/s, 23.4 MB/s"
    assert progress_line(progress) == line + ", about 2.4 min left"
    for terminal in (True, False):
        out = io.StringIO()
        console = Console(file=out, force_terminal=terminal, width=150)
        with LivePreparation(console) as watcher:
            watcher.logged -= 60
            watcher(progress)
            watcher(progress)
            watcher.bar.refresh()
        assert line in out.getvalue()
        if not terminal:
            assert out.getvalue().count("\n") == 1
