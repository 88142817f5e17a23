"""Text to batches: corpora, tokenizers, shards of tokens and the loader.

The way of a text, and the modules along it:

* A corpus, from its name: `sources` opens it. `catalogue` (`corpora.toml`) knows it by name;
  `hub` reads datasets of the Hugging Face Hub, `file_source` files and folders, `embedded_source`
  what comes with the package; `download` fetches a file.
* Documents, from files: `readers` knows JSON lines and Parquet, `text_files` plain text; `streams`
  decompresses.
* A tokenizer, from its name: `tokenizers` (`tokenizers.toml`) opens, saves and loads it;
  `tokenizer_files` finds it in files, packages or on the hub. The kinds are `symbols` (bytes,
  characters), `huggingface` (any tokenizer.json; `bpe` trains one, `gpt2` and `sentencepiece_model`
  make one from other files, `byte_level` runs some faster) and `sentencepieces` (the rest of
  SentencePiece). `vocabulary` is what they share.
* Tokens, from documents: `preparation` writes them. `encoding` tokenizes and hashes in processes,
  `token_stream` says where in the source it is, `workplace` guards the folder.
* The prepared folder: `shards` is its format and index, `splits` its arrays, `verifying` its check;
  `tokens` opens it. For small corpora `tokens` does all of it by itself, from the lists of
  `corpus` into a cache: recorded races depend on its tokens.
* Batches, from tokens: `packing` makes rows of documents, `order` shuffles them, `loader` gives
  those of a step, `prefetch` gets them ready beforehand.
"""

from steepest.data.loader import Loader, validation_batches
from steepest.data.packing import Batch, Packing
from steepest.data.splits import TokenSplit
from steepest.data.tokens import TokenData, open_tokens, prepare

__all__ = [
    "Batch",
    "Loader",
    "Packing",
    "TokenData",
    "TokenSplit",
    "open_tokens",
    "prepare",
    "validation_batches",
]
