"""Ways in which validation text has got into training elsewhere, each tried here.

Seen in public benchmarks: validation cut from the same shuffled windows as training, validation
files picked up by the glob of the training files, a document on both sides because it is in the
corpus twice, and a split that is another one with other files, orders or numbers of processes.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import random
from pathlib import Path

import numpy as np
import pytest
from made_up import ListSource, texts

from steepest.data import Loader, Packing, open_tokens, validation_batches
from steepest.data.preparation import prepare, training_documents
from steepest.data.shards import Index, path_of
from steepest.data.sources import Source, open_source
from steepest.data.symbols import ByteTokenizer
from steepest.data.verifying import verify
from steepest.errors import UserError

BYTES = ByteTokenizer()
DOCUMENTS = texts(300)


def sides(source: Source, folder: Path) -> tuple[list[str], list[str]]:
    """The texts that a prepared corpus trains on, and those it validates on."""
    prepare(source, BYTES, folder, held_out=0.1, shard_tokens=20_000)
    verify(folder)
    data = open_tokens(folder)
    return tuple(
        [BYTES.decode(split.document(n)[:-1].tolist()) for n in range(len(split.ends))]
        for split in (data.train, data.validation)
    )


def test_repeated_documents_are_all_on_one_side(tmp_path: Path) -> None:
    documents = DOCUMENTS * 3
    random.Random(0).shuffle(documents)
    train, validation = sides(ListSource(documents), tmp_path / "out")
    assert not set(train) & set(validation)
    assert sorted(train + validation) == sorted(documents)


def test_validation_documents_in_the_training_split_are_left_out(tmp_path: Path) -> None:
    shipped = texts(30, seed=1)
    documents = [*DOCUMENTS[:100], *shipped, *DOCUMENTS[100:], *shipped]
    train, validation = sides(ListSource(documents, shipped), tmp_path / "out")
    assert (train, validation) == (DOCUMENTS, shipped)
    assert Index.read(tmp_path / "out").splits["train"].left_out == 60


def test_the_split_is_the_same_in_any_order_and_any_files(tmp_path: Path) -> None:
    whole = sides(ListSource(DOCUMENTS), tmp_path / "whole")
    shuffled = random.Random(1).sample(DOCUMENTS, len(DOCUMENTS))
    folder = tmp_path / "files"
    folder.mkdir()
    for number in range(7):
        lines = [json.dumps({"text": text}) + "\n" for text in shuffled[number::7]]
        (folder / f"{number}.jsonl").write_text("".join(lines))
    split = sides(open_source(str(folder)), tmp_path / "split")
    assert [sorted(side) for side in split] == [sorted(side) for side in whole]


def test_a_larger_corpus_keeps_held_out_documents_held_out(tmp_path: Path) -> None:
    _, few = sides(ListSource(DOCUMENTS[:150]), tmp_path / "few")
    train, _ = sides(ListSource([*texts(200, seed=2), *DOCUMENTS]), tmp_path / "many")
    assert not set(few) & set(train)


@pytest.mark.parametrize("mode", ["contiguous", "documents", "rows"])
def test_no_validation_row_is_in_the_training_stream(tmp_path: Path, mode: str) -> None:
    prepare(ListSource(DOCUMENTS), BYTES, tmp_path / "out", held_out=0.1, shard_tokens=20_000)
    data, packing = open_tokens(tmp_path / "out"), Packing(mode)
    arguments = {"batch_size": 4, "sequence_length": 64, "packing": packing}
    validation = {
        row.numpy().tobytes()
        for batch in validation_batches(data.validation, max_tokens=None, **arguments)
        for row in batch.tokens
    }
    loader = Loader(data.train, seed=0, **arguments)
    steps = loader.rows_per_epoch // 4 * 3  # three epochs, at three offsets
    training = {row.numpy().tobytes() for step in range(steps) for row in loader.rows(step).tokens}
    assert len(training) > 100 < len(validation) * 20
    assert not training & validation
    # Nor anywhere between the windows: not one stretch of 32 tokens of a held-out document.
    stream = np.asarray(data.train.tokens[:]).tobytes()
    for number in range(len(data.validation.ends)):
        document = data.validation.document(number)
        for start in range(0, len(document) - 33, 32):
            assert document[start : start + 32].tobytes() not in stream


def test_validation_files_beside_training_files_are_no_training_files(tmp_path: Path) -> None:
    """C4's layout, in one folder."""
    for split, documents in (("train", DOCUMENTS), ("validation", texts(20, seed=1))):
        with gzip.open(tmp_path / f"c4-{split}.00000-of-00001.json.gz", "wt") as file:
            for text in documents:
                record = {"text": text, "timestamp": "2019-04-25T12:57:54Z", "url": "http://a.b"}
                file.write(json.dumps(record) + "\n")
    assert sides(open_source(str(tmp_path)), tmp_path / "out") == (DOCUMENTS, texts(20, seed=1))


def test_a_tokenizer_is_made_from_training_documents_alone(tmp_path: Path) -> None:
    shipped = texts(30, seed=1)
    for source in (ListSource(DOCUMENTS), ListSource([*DOCUMENTS, *shipped[:9]], shipped)):
        folder = tmp_path / source.fingerprint
        train, _ = sides(source, folder)
        assert list(training_documents(source, 0.1)) == train


def test_verifying_finds_a_leak(tmp_path: Path) -> None:
    """A training shard that holds validation documents, with all else made to look right."""
    folder = tmp_path / "out"
    source = ListSource(DOCUMENTS, texts(3, seed=1))
    prepare(source, BYTES, folder, tokens=1)
    index = Index.read(folder)
    (shard,) = index.splits["validation"].shards
    for kind in ("tokens", "ends", "hashes"):
        data = path_of(folder, "validation", 0, kind).read_bytes()
        path_of(folder, "train", 0, kind).write_bytes(data)
        assert hashlib.sha256(data).hexdigest() == shard.sha256[kind]
    entry = dataclasses.replace(index.splits["train"], shards=(shard,))
    index.with_split("train", entry).write(folder)
    with pytest.raises(UserError, match="3 training documents are validation documents"):
        verify(folder)
