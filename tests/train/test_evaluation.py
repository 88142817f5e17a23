"""The held-out loss against sums written out, however its tokens are shared out."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from steepest import data, models
from steepest.data.splits import ShardedArray, TokenSplit
from steepest.errors import UserError
from steepest.models.cross_entropy import IGNORED
from steepest.train import RunConfig, Runtime, run
from steepest.train.evaluation import evaluate
from steepest.train.parallel import Parallel

from .conftest import MakeConfig

CPU = torch.device("cpu")
LENGTHS = [1, 2, 40, 3, 17, 16, 90, 5, 33, 1, 61]
"""Tokens of uneven documents: 269, which are 16 windows of 16 and a rest."""


def uneven_split() -> TokenSplit:
    rng = np.random.default_rng(0)
    ends = np.cumsum(LENGTHS, dtype=np.int64)
    tokens = rng.integers(2, 300, size=ends[-1], dtype=np.uint16)
    tokens[ends - 1] = 1
    return TokenSplit(ShardedArray([tokens]), ShardedArray([ends]), bytes=1000)


def model_of(config: RunConfig) -> models.LanguageModel:
    return models.build(config.model, torch.Generator().manual_seed(0))


def one_by_one(model: models.LanguageModel, split: TokenSplit, config: RunConfig) -> list[float]:
    """Return the loss of every target, in float64, row by row."""
    exact = model_of(config).double()
    exact.load_state_dict(model.state_dict())
    rows = data.validation_batches(
        split, batch_size=1, sequence_length=16, max_tokens=None, packing=config.data.as_packing()
    )
    found: list[float] = []
    for row in rows:
        with torch.no_grad():
            logits = exact(row.tokens, row.documents).double()
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), row.targets.flatten(), reduction="none"
        )
        found += losses[row.targets.flatten() != IGNORED].tolist()
    return found


@pytest.mark.parametrize("packing", ["contiguous", "documents", "rows"])
def test_every_target_weighs_the_same_whatever_the_batch(
    packing: str, make_config: MakeConfig
) -> None:
    split = uneven_split()
    config = make_config(packing=packing)
    model = model_of(config)
    losses = one_by_one(model, split, config)
    wanted = sum(losses) / len(losses)
    for batch_size in (1, 3, 5, 16, 64):
        config = make_config(packing=packing, batch_size=batch_size)
        score = evaluate(model, split, config, CPU, tokens=10**9)
        assert score.nats == pytest.approx(wanted, rel=2e-7), batch_size
        assert score.perplexity == pytest.approx(math.exp(wanted), rel=1e-6)
        assert score.bits_per_byte == pytest.approx(
            wanted / math.log(2) * sum(LENGTHS) / 1000, rel=1e-6
        )
    assert model.training


class Rank(Parallel):
    """A process whose sums are those of processes asked before it, and its own."""

    def __init__(self, rank: int, world_size: int, before: list[Tensor]) -> None:
        self.rank, self.world_size, self.before = rank, world_size, before

    def sum(self, value: Tensor) -> Tensor:
        self.before.append(value)
        return torch.stack(self.before).sum(0)


@pytest.mark.parametrize("world", [2, 3, 4, 7])
@pytest.mark.parametrize("tokens", [16, 100, 256])
def test_processes_share_the_tokens_of_one(
    world: int, tokens: int, make_config: MakeConfig
) -> None:
    split = uneven_split()
    config = make_config(packing="documents", batch_size=3)
    model = model_of(config)
    alone = evaluate(model, split, config, CPU, tokens=tokens).nats
    sums: list[Tensor] = []
    for rank in range(world):  # some have no batch
        score = evaluate(model, split, config, CPU, tokens=tokens, parallel=Rank(rank, world, sums))
    assert score.nats == pytest.approx(alone, rel=1e-14)
    assert all(total.dtype == torch.float64 for total in sums)


@pytest.mark.parametrize(("tokens", "targets"), [(16, 16), (31, 16), (100, 96), (256, 256)])
def test_a_budget_is_cut_to_whole_rows_spread_over_the_split(
    tokens: int, targets: int, make_config: MakeConfig
) -> None:
    split, config = uneven_split(), make_config()
    model = model_of(config)
    losses = one_by_one(model, split, config)
    rows = [sum(losses[16 * row : 16 * row + 16]) / 16 for row in range(16)]
    used = targets // 16
    wanted = sum(rows[16 * place // used] for place in range(used)) / used
    found = evaluate(model, split, config, CPU, tokens=tokens).nats
    assert found == pytest.approx(wanted, rel=2e-7)
    assert evaluate(model, split, config, CPU, tokens=10**6).nats == pytest.approx(
        sum(rows) / 16, rel=2e-7
    )
    with pytest.raises(UserError, match="at most 15 tokens leaves no sequence of 16"):
        evaluate(model, split, config, CPU, tokens=15)


def test_text_with_nothing_to_predict_is_refused(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(packing="rows", sequence_length=1)
    with pytest.raises(UserError, match="None of the tokens to evaluate has one to predict"):
        run(config, tmp_path, runtime=Runtime(threads=1))


@pytest.mark.parametrize("name", ["bfloat16", "pure_bfloat16"])
def test_losses_of_bfloat16_weights_are_added_up_in_float64(
    name: Any, make_config: MakeConfig
) -> None:
    # A loss near 5.7 in bfloat16 would be a multiple of 1/32.
    split, config = uneven_split(), make_config(precision=name)
    model = model_of(config)
    exact = evaluate(model, split, make_config(precision="float32"), CPU, tokens=256).nats
    if name == "pure_bfloat16":
        model = model.to(torch.bfloat16)
    found = evaluate(model, split, config, CPU, tokens=256).nats
    assert found != exact
    assert found == pytest.approx(exact, abs=2e-3)
