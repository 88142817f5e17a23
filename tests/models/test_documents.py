"""Documents packed into a sequence are as alone: positions, attention, every architecture."""

from __future__ import annotations

import pytest
import torch

from steepest.models import GPT2Config, LlamaConfig, ModelConfig, build
from steepest.models.documents import mask, positions

LENGTHS = (5, 1, 9, 7)
NUMBERS = (4, 0, 7, 4)  # any numbers, as long as neighbours differ


def packed() -> torch.Tensor:
    numbers = [n for n, length in zip(NUMBERS, LENGTHS, strict=True) for _ in range(length)]
    return torch.tensor([numbers, numbers[::-1]], dtype=torch.int32)


def test_positions_and_mask() -> None:
    documents = torch.tensor([[3, 3, 1, 1, 1, 3]], dtype=torch.int32)
    assert positions(documents).tolist() == [[0, 1, 0, 1, 2, 0]]
    seen = mask(documents)[0, 0]
    assert [row.nonzero().flatten().tolist() for row in seen] == [
        [0], [0, 1], [2], [2, 3], [2, 3, 4], [5],
    ]  # fmt: skip


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(vocab_size=50, hidden_size=32, max_sequence_length=64),
        LlamaConfig(vocab_size=50, hidden_size=32, kv_heads=2, max_sequence_length=64),
        GPT2Config(vocab_size=50, hidden_size=32, max_sequence_length=64),
    ],
    ids=lambda config: config.architecture,
)
def test_a_packed_document_is_as_alone(config: ModelConfig) -> None:
    model = build(config)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(10 if p.ndim > 1 else 1)
    documents = packed()
    tokens = torch.randint(50, documents.shape, generator=torch.Generator().manual_seed(0))
    together = model(tokens, documents)
    for row, lengths in enumerate((LENGTHS, LENGTHS[::-1])):
        start = 0
        for length in lengths:
            part = slice(start, start + length)
            alone = model(tokens[row : row + 1, part])
            torch.testing.assert_close(together[row : row + 1, part], alone, rtol=1e-4, atol=1e-4)
            start += length
