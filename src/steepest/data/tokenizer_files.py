"""Tokenizers from files: of a folder, of an installed package, or of the Hugging Face hub."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from steepest.data import gpt2, sentencepiece_model
from steepest.data.huggingface import HuggingFaceTokenizer
from steepest.data.sentencepieces import SentencePieceTokenizer
from steepest.data.vocabulary import END_OF_DOCUMENT
from steepest.errors import UserError

FromFile = HuggingFaceTokenizer | SentencePieceTokenizer

CONFIG = "tokenizer_config.json"
SPECIAL = "special_tokens_map.json"
MODELS = ("tokenizer.model", "spiece.model")
# Vocabulary and merges of GPT-2, as OpenAI and as Hugging Face call them.
OPENAI = ("encoder.json", "vocab.bpe")
PAIR = ("vocab.json", "merges.txt")
# What is fetched from the hub: all that a tokenizer may consist of, no weights and no code.
HUB_FILES = (
    *("tokenizer.json", CONFIG, SPECIAL, *MODELS, *OPENAI, *PAIR),
    *("vocab.txt", "*.bpe.model", "added_tokens.json", "config.json"),
)
# What tokenizers without a configuration call their end of a document.
USUAL_ENDS = (END_OF_DOCUMENT, "</s>", "<|end_of_text|>", "<eos>")


def open_path(path: Path, *, name: str, end: str | None) -> FromFile:
    """Open a tokenizer.json, a SentencePiece .model, or a folder that holds one.

    `end` names the token that ends a document; None means the tokenizer's own end of sequence, from
    its configuration beside it or else one of USUAL_ENDS. A folder with neither file is read by
    `transformers`, without running code from it. Raises UserError when it holds no tokenizer, and
    when there is no such token.
    """
    if not path.is_dir():
        return _open_file(path, name, end or _configured_end(path.parent))
    end = end or _configured_end(path)
    if (path / "tokenizer.json").is_file():
        return _open_file(path / "tokenizer.json", name, end)
    for model in MODELS:
        if (path / model).is_file():
            return _open_file(path / model, name, end)
    if all((path / part).is_file() for part in OPENAI):
        return open_description(gpt2.description(*(path / part for part in OPENAI)), name, end)
    if all((path / part).is_file() for part in PAIR) and _is_gpt2(path):
        return open_description(gpt2.description(*(path / part for part in PAIR)), name, end)
    if any((path / file).is_file() for file in (CONFIG, "config.json")):
        return open_by_transformers(str(path), name=name, end=end)
    raise UserError(
        f"Folder {path} holds no tokenizer: neither tokenizer.json nor {', '.join(MODELS)}, "
        f"{' with '.join(OPENAI)} or {CONFIG}."
    )


def open_package(module: str, parts: tuple[str, ...], *, name: str, end: str) -> FromFile | None:
    """Open a tokenizer that an installed package ships, without importing it; None if it doesn't.

    `parts` are its files in the package's folder: one, or a vocabulary and its merges.
    """
    spec = importlib.util.find_spec(module)
    folders = spec.submodule_search_locations if spec is not None else None
    for folder in folders or []:
        paths = [Path(folder) / part for part in parts]
        if all(path.is_file() for path in paths):
            if len(paths) == 1:
                return _open_file(paths[0], name, end)
            return open_description(gpt2.description(*paths), name, end)
    return None


def open_hub(repository: str, *, name: str, end: str | None) -> FromFile:
    """Open a tokenizer of the hub, `ORG/NAME` or `ORG/NAME@REVISION`; its files stay in the cache.

    Raises UserError, which says what to pass instead, when it can't be had.
    """
    try:
        import huggingface_hub
    except ImportError as error:
        raise UserError(
            f"Tokenizer {name} of the hub needs the package 'huggingface_hub': "
            "pip install huggingface_hub, or pass a folder that holds it."
        ) from error
    repository, _, revision = repository.partition("@")
    try:
        folder = huggingface_hub.snapshot_download(
            repository,
            revision=revision or None,
            allow_patterns=list(HUB_FILES),
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"Tokenizer {name} can't be had from the hub ({_reason(error)}); pass a folder or a "
            "tokenizer.json of it instead, or an installed tokenizer such as 'bytes'."
        ) from error
    return open_path(Path(folder), name=name, end=end)


def open_by_transformers(place: str, *, name: str, end: str | None) -> FromFile:
    """Open a folder with a vocabulary in an older format; no code from it is run."""
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise UserError(
            f"Tokenizer {name} has neither a tokenizer.json nor a SentencePiece model; to read its "
            "older format: pip install transformers."
        ) from error
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(
            place, trust_remote_code=False, local_files_only=True
        )
        description: str = tokenizer.backend_tokenizer.to_str()
    except Exception as error:  # the library raises all sorts of errors
        raise UserError(f"Tokenizer {name} can't be read: {_reason(error)}.") from error
    return open_description(description, name, end or tokenizer.eos_token)


def open_description(description: str, name: str, end: str | None) -> HuggingFaceTokenizer:
    """Open the text of a tokenizer.json whose token `end` ends a document."""
    try:
        data = json.loads(description)
        special = {t["content"]: t["id"] for t in data["added_tokens"]}
        vocabulary = data["model"]["vocab"]
        if isinstance(vocabulary, list):
            vocabulary = {piece[0]: index for index, piece in enumerate(vocabulary)}
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(f"Tokenizer {name} has no readable tokenizer.json.") from error
    found = _end_id({**vocabulary, **special}, special, name, end)
    return HuggingFaceTokenizer(description, name=name, end=found)


def _open_file(path: Path, name: str, end: str | None) -> FromFile:
    if path.suffix == ".json":
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"Tokenizer file {path} can't be read: {error}.") from error
        return open_description(text, name, end)
    if ".model" in path.name:
        return _open_sentencepiece(path, name, end)
    raise UserError(f"{path} is no tokenizer: neither a tokenizer.json nor a SentencePiece .model.")


def _open_sentencepiece(path: Path, name: str, end: str | None) -> FromFile:
    data = path.read_bytes()
    model = sentencepiece_model.read(data, name)
    description = sentencepiece_model.description(model)
    if description is not None:
        return open_description(description, name, end or model.end)
    ids = {piece.text: index for index, piece in enumerate(model.pieces)}
    found = _end_id(ids, {model.end: -1}, name, end or model.end)
    return SentencePieceTokenizer(data, name=name, end=found)


def _end_id(ids: dict[str, int], special: dict[str, int], name: str, end: str | None) -> int:
    """Return the id of the token `end`, or of the one special token that is usual."""
    if end is None:
        usual = [token for token in USUAL_ENDS if token in special]
        if len(usual) != 1:
            raise UserError(
                f"Tokenizer {name} doesn't say which token ends a document; name it with "
                "--end-token."
            )
        end = usual[0]
    if end not in ids:
        raise UserError(f"Tokenizer {name} has no token {end!r} to end documents with.")
    return ids[end]


def _configured_end(folder: Path) -> str | None:
    """Return the end of sequence that a tokenizer's configuration names, if it names one."""
    for file in (CONFIG, SPECIAL):
        token = _json(folder / file).get("eos_token")
        if isinstance(token, dict):
            token = token.get("content")
        if isinstance(token, str):
            return token
    return None


def _is_gpt2(folder: Path) -> bool:
    kind = _json(folder / CONFIG).get("tokenizer_class", "GPT2Tokenizer")
    return kind in {"GPT2Tokenizer", "GPT2TokenizerFast"}


def _json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; empty when there is no such file."""
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is no JSON: {error}.") from error
    return data if isinstance(data, dict) else {}


def _reason(error: Exception) -> str:
    """Return an error's kind and first line, without its full stop."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0].rstrip('.')}"
