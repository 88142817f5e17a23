"""Averages of the weights against sums written out, and in runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from steepest.errors import UserError
from steepest.train import AveragingConfig, Runtime, run
from steepest.train.averaging import Averages

from .conftest import MakeConfig


class Tied(nn.Module):
    """A table that is its own head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(4, 3)
        self.head = nn.Linear(3, 4, bias=False)
        self.head.weight = self.embedding.weight


def walk(averages: Averages, weight: nn.Parameter, steps: int) -> list[torch.Tensor]:
    """Set the weight to a new value in every step; return all values in float64."""
    rng = torch.Generator().manual_seed(0)
    seen = []
    for step in range(1, steps + 1):
        with torch.no_grad():
            weight.copy_(torch.randn(weight.shape, generator=rng))
        averages.update(step)
        seen.append(weight.detach().double())
    return seen


def test_several_averages_at_once_of_a_tied_weight_counted_once() -> None:
    model = Tied()
    config = AveragingConfig(every=2, ema=(0.5, 0.9), windows=(1, 3), start=4)
    averages = Averages(config, model)
    seen = walk(averages, model.embedding.weight, 12)
    samples = [seen[step - 1] for step in (4, 6, 8, 10, 12)]
    assert averages.names() == ["ema_0.5", "ema_0.9", "window_1", "window_3"]
    expected = {
        "window_1": samples[-1],
        "window_3": torch.stack(samples[-3:]).mean(0),
    }
    for decay in (0.5, 0.9):
        average = samples[0]
        for sample in samples[1:]:
            average = decay * average + (1 - decay) * sample
        expected[f"ema_{decay}"] = average
    now = model.embedding.weight.detach().clone()
    for name, value in expected.items():
        with averages.weights(name):
            torch.testing.assert_close(model.head.weight.double(), value, rtol=1e-6, atol=1e-7)
        assert torch.equal(model.embedding.weight, now)


def test_a_window_that_is_not_full_is_not_an_average_yet() -> None:
    model = Tied()
    averages = Averages(AveragingConfig(every=1, windows=(3,)), model)
    walk(averages, model.embedding.weight, 2)
    assert averages.names() == []


def test_small_changes_of_bfloat16_weights_are_not_lost() -> None:
    model = Tied().to(torch.bfloat16)
    averages = Averages(AveragingConfig(every=1, ema=(0.999,)), model)
    for step, value in enumerate((0.0, 1.0), start=1):
        nn.init.constant_(model.embedding.weight, value)
        averages.update(step)
    assert averages.exponential[0.999][0].unique().item() == pytest.approx(0.001, rel=1e-5)


def test_averages_are_evaluated_beside_the_weights_and_change_nothing(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    runtime = Runtime(threads=1)
    plain = run(make_config(steps=20), tmp_path, runtime=runtime)
    config = make_config(steps=20, ema=(0.5,), windows=(2,), **{"averaging.every": 5})
    averaged = run(config, tmp_path, runtime=runtime)
    assert averaged["val_loss"] == plain["val_loss"]
    lines = (tmp_path / str(averaged["hash"]) / "metrics.jsonl").read_text().splitlines()
    last = [json.loads(line) for line in lines if '"eval"' in line][-1]
    assert set(last["averaged"]) == {"ema_0.5", "window_2"}
    assert averaged["averaged"] == last["averaged"]
    assert all(abs(loss - last["val_loss"]) < 0.5 for loss in last["averaged"].values())
    assert len({*last["averaged"].values(), last["val_loss"]}) == 3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"every": 0}, "averaging.every must be at least 1"),
        ({"ema": (1.0,)}, "averaging.ema must be between 0 and 1"),
        ({"windows": (0,)}, "averaging.windows must be at least 1"),
        ({"start": -1}, "averaging.start must be at least 0"),
    ],
)
def test_wrong_values_are_refused(changes: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        AveragingConfig(**changes)
