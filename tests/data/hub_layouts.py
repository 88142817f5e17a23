"""Folders with exactly the files, columns and cards of datasets on the Hugging Face Hub."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
zstandard = pytest.importorskip("zstandard")


def texts(prefix: str, count: int) -> list[str]:
    """Short documents that are hard on readers here and there."""
    hard = ["naïve 日本語 \u2028 😀", "two\nlines", "  spaces \t", 'a\\b "c"']
    return [f"{prefix} {index} {hard[index % 4]}" for index in range(count)]


def lines(rows: Iterable[dict[str, Any]]) -> bytes:
    """JSON lines."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def c4(folder: Path, train: Sequence[str], validation: Sequence[str], shards: int = 3) -> Path:
    """allenai/c4: `en/c4-train.00000-of-01024.json.gz` and a card that names the splits."""
    (folder / "en").mkdir(parents=True)
    (folder / "README.md").write_text(
        """---
license: odc-by
configs:
- config_name: en
  data_files:
  - split: train
    path: en/c4-train.*.json.gz
  - split: validation
    path: en/c4-validation.*.json.gz
- config_name: realnewslike
  data_files:
  - split: train
    path: realnewslike/c4-train.*.json.gz
  - split: validation
    path: realnewslike/c4-validation.*.json.gz
---
# C4
"""
    )
    for split, documents, count, of in [
        ("train", train, shards, 1024),
        ("validation", validation, 2, 8),
    ]:
        for shard in range(count):
            rows = (
                {"text": text, "timestamp": "2019-04-25T12:57:54Z", "url": "https://a.org"}
                for text in documents[shard::count]
            )
            name = f"c4-{split}.{shard:05}-of-{of:05}.json.gz"
            (folder / "en" / name).write_bytes(gzip.compress(lines(rows)))
    return folder


def fineweb(folder: Path, train: Sequence[str], rows_per_group: int = 5) -> Path:
    """HuggingFaceFW/fineweb: `sample/100BT/000_00000.parquet` beside the crawls."""
    crawl = folder / "data" / "CC-MAIN-2013-20"
    crawl.mkdir(parents=True)
    pq.write_table(pa.table({"text": ["of a crawl"]}), crawl / "000_00000.parquet")
    (folder / "sample" / "100BT").mkdir(parents=True)
    (folder / "README.md").write_text(
        """---
license: odc-by
configs:
- config_name: default
  data_files:
  - split: train
    path: data/*/*
- config_name: sample-100BT
  data_files:
  - split: train
    path: sample/100BT/*
---
# FineWeb
"""
    )
    half = len(train) // 2
    for shard, documents in enumerate([train[:half], train[half:]]):
        count = len(documents)
        table = pa.table(
            {
                "text": documents,
                "id": [f"<urn:uuid:{index}>" for index in range(count)],
                "dump": ["CC-MAIN-2013-20"] * count,
                "url": ["http://a.org"] * count,
                "date": ["2013-05-18T05:48:54Z"] * count,
                "file_path": ["s3://commoncrawl/a.warc.gz"] * count,
                "language": ["en"] * count,
                "language_score": [0.95] * count,
                "token_count": [len(text) for text in documents],
            }
        )
        path = folder / "sample" / "100BT" / f"{shard:03}_00000.parquet"
        pq.write_table(table, path, row_group_size=rows_per_group)
    return folder


def slimpajama(folder: Path, train: Sequence[str], validation: Sequence[str]) -> Path:
    """cerebras/SlimPajama-627B: folders of chunks and no list of files in the card."""
    (folder / "README.md").parent.mkdir(parents=True)
    (folder / "README.md").write_text("---\nlanguage:\n- en\n---\n# SlimPajama\n")
    layout = {
        "train/chunk1/example_train_0": train[::2],
        "train/chunk2/example_train_0": train[1::2],
        "validation/chunk1/example_holdout_0": validation,
        "test/chunk1/example_holdout_0": ["a test document"],
    }
    for name, documents in layout.items():
        rows = ({"text": text, "meta": {"redpajama_set_name": "RedPajamaC4"}} for text in documents)
        _write_zstd(folder / f"{name}.jsonl.zst", lines(rows))
    return folder


def wikitext(folder: Path, train: Sequence[str], validation: Sequence[str]) -> Path:
    """Salesforce/wikitext: one row a line, two configurations; the arguments are whole splits.

    In the rows a blank line is "" and any other one ends in a line feed.
    """
    names = ["wikitext-103-raw-v1", "wikitext-2-raw-v1"]
    configs = "".join(
        f"- config_name: {name}\n  data_files:\n"
        + "".join(
            f"  - split: {split}\n    path: {name}/{split}-*\n"
            for split in ("test", "train", "validation")
        )
        for name in names
    )
    folder.mkdir(parents=True)
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n# WikiText\n")
    for name in names:
        (folder / name).mkdir()
        half = len(train) // 2
        for file, rows in {
            "train-00000-of-00002": train[:half],
            "train-00001-of-00002": train[half:],
            "validation-00000-of-00001": validation,
            "test-00000-of-00001": ["a test line"],
        }.items():
            path = folder / name / f"{file}.parquet"
            pq.write_table(pa.table({"text": list(rows)}), path, row_group_size=7)
    return folder


def redpajama(folder: Path, by_subset: dict[str, list[str]]) -> Path:
    """togethercomputer/RedPajama-Data-1T-Sample: columns and meta data differ by file."""
    folder.mkdir(parents=True)
    (folder / "RedPajama-Data-1T-Sample.py").write_text("raise RuntimeError('not to be run')\n")
    extra: dict[str, dict[str, Any]] = {
        "arxiv": {"meta": {"timestamp": "x", "yymm": "1", "arxiv_id": "2", "url": "u"}},
        "book": {"meta": {"short_book_title": "x", "publication_date": 1919, "url": "u"}},
        "cc_2019-30": {"pred_label": "__label__cc", "pred_label_prob": 0.5, "source": "cc"},
        "github": {"meta": {"content_hash": "x", "line_count": 3, "language": [{"n": "C"}]}},
    }
    for subset, documents in by_subset.items():
        rows = ({"text": text, **extra[subset]} for text in documents)
        (folder / f"{subset}_sample.jsonl").write_bytes(lines(rows))
    return folder


def redpajama_v2(folder: Path, documents: Sequence[str]) -> Path:
    """togethercomputer/RedPajama-Data-V2: the sample's documents beside its quality signals."""
    for language, kept in {"de": documents[::2], "en": documents[1::2]}.items():
        path = folder / "sample" / "documents" / "2023-06" / "0000" / f"{language}_head.json.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = ({"url": "u", "raw_content": text, "bucket": "head"} for text in kept)
        path.write_bytes(gzip.compress(lines(rows)))
        signals = folder / "sample" / "quality_signals" / "2023-06" / "0000"
        signals.mkdir(parents=True, exist_ok=True)
        (signals / f"{language}_head.signals.json.gz").write_bytes(gzip.compress(b"{}\n"))
    return folder


def proof_pile(folder: Path, train: Sequence[str], validation: Sequence[str]) -> Path:
    """EleutherAI/proof-pile-2: `arxiv/train/arXiv_000.jsonl.zst`, other subsets and a script."""
    (folder / "algebraic-stack").mkdir(parents=True)
    (folder / "proof-pile-2.py").write_text("raise RuntimeError('not to be run')\n")
    for name, documents in {
        "train/arXiv_000": train[::2],
        "train/arXiv_001": train[1::2],
        "validation/arXiv_000": validation,
    }.items():
        rows = (
            {"text": text, "meta": {"arxiv_id": "1", "yymm": None if i % 2 else "0001"}}
            for i, text in enumerate(documents)
        )
        _write_zstd(folder / "arxiv" / f"{name}.jsonl.zst", lines(rows))
    return folder


def _write_zstd(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(zstandard.ZstdCompressor().compress(data))
