"""GPT-2's byte-level BPE (Radford et al., 2019): from a vocabulary and its merges."""

from __future__ import annotations

import json
from pathlib import Path

from steepest.data import bpe
from steepest.data.vocabulary import END_OF_DOCUMENT
from steepest.errors import UserError


def description(vocab: Path, merges: Path) -> str:
    """Return the tokenizer.json of a vocabulary (encoder.json) and its merges (vocab.bpe).

    Hugging Face calls the same two files vocab.json and merges.txt. Raises UserError when they are
    not a vocabulary and merges of it.
    """
    bpe.library_version()
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    try:
        table = json.loads(vocab.read_text(encoding="utf-8"))
        tokenizer = Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
    except Exception as error:  # the library raises nothing narrower
        raise UserError(
            f"{vocab} and {merges.name} are not a vocabulary and its merges: {error}"
        ) from error
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if END_OF_DOCUMENT in table:
        tokenizer.add_special_tokens([END_OF_DOCUMENT])
    return tokenizer.to_str()
