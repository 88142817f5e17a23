"""Rows: what is in them, what they predict, and whose document a token belongs to."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from made_up import split_of

from steepest.data import Batch, Packing, TokenSplit
from steepest.data.packing import IGNORED, PADDING, count, take
from steepest.errors import UserError
from steepest.models import Llama, LlamaConfig, documents

LENGTHS = [5, 1, 17, 3, 1, 1, 40, 8, 2, 30, 12]  # of documents; some have no text
END = 999


@pytest.fixture(params=[(), (7,), (3, 23, 24, 70)], ids=["one file", "two", "five"])
def split(request: pytest.FixtureRequest) -> TokenSplit:
    """The same documents in one file, or in several with documents across their borders."""
    return split_of(LENGTHS, parts=request.param)


def everything(split: TokenSplit, packing: Packing, length: int, offset: int = 0) -> Batch:
    rows = count(split, packing, length, offset=offset)
    return take(split, packing, np.arange(rows)[::-1].copy(), length, offset=offset)


def owners() -> np.ndarray:
    """The number of every token's document, by counting."""
    return np.repeat(np.arange(len(LENGTHS)), LENGTHS)


def test_contiguous_rows_are_the_stream(split: TokenSplit) -> None:
    stream = np.asarray(split.tokens[:]).astype(np.int64)
    batch = everything(split, Packing(), 8, offset=3)
    assert batch.tokens.dtype == batch.targets.dtype == torch.int64
    assert batch.documents is None
    assert len(batch.tokens) == (len(stream) - 1 - 3) // 8
    tokens, targets = batch.tokens.flip(0).flatten(), batch.targets.flip(0).flatten()
    assert torch.equal(tokens, torch.from_numpy(stream[3 : 3 + len(tokens)]))
    assert torch.equal(targets, torch.from_numpy(stream[4 : 4 + len(tokens)]))


@pytest.mark.parametrize("context", [None, 1, 4, 16, 100])
def test_rows_of_documents(split: TokenSplit, context: int | None) -> None:
    length, offset = 16, 2
    batch = everything(split, Packing("documents", context), length, offset)
    plain = everything(split, Packing(), length, offset)
    assert batch.documents is not None
    assert batch.documents.dtype == torch.int32
    assert torch.equal(batch.tokens, plain.tokens)
    for row in range(len(batch.tokens)):
        start = (len(batch.tokens) - 1 - row) * length + offset
        number, begun = -1, 0
        for place in range(length):
            owner = owners()[start + place]
            if place == 0 or owner != owners()[start + place - 1]:
                number, begun = number + 1, place
            elif context is not None and (place - begun) % context == 0:
                number += 1
            assert batch.documents[row, place] == number
            same = owners()[start + place + 1] == owner
            expected = plain.targets[row, place] if same else IGNORED
            assert batch.targets[row, place] == expected


def test_only_first_tokens_of_documents_are_not_predicted(split: TokenSplit) -> None:
    batch = everything(split, Packing("documents"), 10)
    last = 10 * len(batch.tokens)
    borders = sum(1 for end in np.cumsum(LENGTHS) if end <= last)
    assert int((batch.targets == IGNORED).sum()) == borders
    assert torch.equal(batch.targets == IGNORED, batch.tokens == END)


def test_a_context_bounds_what_sees_each_other() -> None:
    split = split_of([3 * 4096 + 100, 40_000])
    batch = take(split, Packing("documents", 4096), np.arange(1), 32_768)
    assert batch.documents is not None
    places = documents.positions(batch.documents)
    assert int(places.max()) == 4095
    sizes = torch.bincount(batch.documents[0]).tolist()
    assert sizes == [4096, 4096, 4096, 100, 4096, 4096, 4096, 4096, 3996]


def test_a_document_per_row(split: TokenSplit) -> None:
    batch = everything(split, Packing("rows"), 16)
    assert len(batch.tokens) == len(LENGTHS)
    assert batch.documents is None
    for row, document in enumerate(reversed(range(len(LENGTHS)))):
        whole = split.document(document).astype(int).tolist()
        shown = whole if len(whole) <= 16 else [*whole[:15], END]
        padding = 16 - len(shown)
        assert batch.tokens[row].tolist() == shown + [PADDING] * padding
        assert batch.targets[row].tolist() == [*shown[1:], IGNORED] + [IGNORED] * padding


def test_padding_changes_no_loss() -> None:
    split = split_of([9, 4], end=0)
    split = TokenSplit(split.tokens, split.ends, split.bytes)
    model = Llama(LlamaConfig(vocab_size=1100, hidden_size=16, layers=1, intermediate_size=32))
    padded = take(split, Packing("rows"), np.arange(2), 12)
    other = torch.where(padded.tokens == PADDING, 7, padded.tokens)
    ends = [8, 3]
    for row, end in enumerate(ends):
        other[row, end] = 0  # the end of a document is no padding
    expected = torch.cat([padded.targets[row, :end] for row, end in enumerate(ends)])
    assert torch.equal(padded.targets[padded.targets != IGNORED], expected)
    torch.testing.assert_close(
        model.loss(padded.tokens, padded.targets), model.loss(other, padded.targets)
    )


def test_documents_in_a_row_are_as_good_as_alone() -> None:
    """The loss of packed documents is that of each document by itself."""
    lengths = [6, 11, 1, 14]
    split = split_of([*lengths, 5], end=1)
    model = Llama(LlamaConfig(vocab_size=1100, hidden_size=16, layers=2, intermediate_size=32))
    packed = take(split, Packing("documents"), np.arange(1), sum(lengths))
    assert packed.documents is not None
    total, number = 0.0, 0
    for document in (0, 1, 3):
        tokens = torch.from_numpy(split.document(document).astype(np.int64))[None]
        total += model.loss(tokens[:, :-1], tokens[:, 1:]).item() * (tokens.numel() - 1)
        number += tokens.numel() - 1
    loss = model.loss(packed.tokens, packed.targets, packed.documents)
    assert loss.item() == pytest.approx(total / number, abs=1e-5)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("document",), "Unknown packing 'document'; did you mean 'documents'"),
        (("contiguous", 8), "A context goes with packing 'documents', not 'contiguous'"),
        (("documents", 0), "context must be at least 1, not 0"),
    ],
)
def test_impossible_packings_are_refused(arguments: tuple, words: str) -> None:
    with pytest.raises(UserError, match=words):
        Packing(*arguments)
