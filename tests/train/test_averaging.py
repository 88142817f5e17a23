"""Averages of the weights against sums written out, and in runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

from steepest.errors import UserError
from steepest.train import AveragingConfig, Runtime, run
from steepest.train.averaging import Averages

from .conftest import MakeConfig
from .test_parallel import free_port, losses, one_process
from .test_resume import assert_same_bits


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
    half = 0.9930924954370359  # of 100 samples: more digits than %g prints
    config = AveragingConfig(every=2, ema=(0.5, half), windows=(1, 3), start=4)
    averages = Averages(config, model)
    seen = walk(averages, model.embedding.weight, 12)
    samples = [seen[step - 1] for step in (4, 6, 8, 10, 12)]
    assert averages.names() == ["ema_0.5", f"ema_{half}", "window_1", "window_3"]
    expected = {
        "window_1": samples[-1],
        "window_3": torch.stack(samples[-3:]).mean(0),
    }
    for decay in (0.5, half):
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
        ({"ema": (0.5, 0.9, 0.5)}, r"averaging.ema has a value more than once: \[0.5, 0.9, 0.5\]"),
        ({"windows": (2, 2)}, "averaging.windows has a value more than once"),
        ({"windows": (0,)}, "averaging.windows must be at least 1"),
        ({"start": -1}, "averaging.start must be at least 0"),
    ],
)
def test_wrong_values_are_refused(changes: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        AveragingConfig(**changes)


@pytest.mark.slow
def test_averages_of_shards_are_those_of_the_whole_and_continue_to_the_bit(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    # Schedule-free, so that three kinds of weights take turns: in training, evaluated, averaged.
    config = make_config(
        name="schedulefree_adamw", steps=8, every=2, tie_embeddings=True,
        ema=(0.5, 0.75), windows=(1, 3), **{"averaging.every": 2},
    )  # fmt: skip
    file = tmp_path / "run.toml"
    file.write_text(config.to_toml())
    runtime = Runtime(threads=1, checkpoint_every=4, log_every=1)
    alone = run(config, tmp_path / "one", runtime=runtime)
    folder = tmp_path / "fsdp" / str(alone["hash"])

    def last(of: Path) -> Path:
        return next((of / "checkpoints").glob("step-000000008*.pt"))

    def train() -> dict[str, Any]:
        mp.spawn(one_process, args=(2, free_port(), str(tmp_path), [f"fsdp\n{file}"]), nprocs=2)
        return torch.load(last(folder), weights_only=True)["averages"]  # type: ignore[no-any-return]

    def result() -> dict[str, float]:
        return json.loads((folder / "result.json").read_text())["averaged"]  # type: ignore[no-any-return]

    whole, averaged = train(), result()
    assert averaged == pytest.approx(alone["averaged"], rel=1e-5)
    assert set(averaged) == {"ema_0.5", "ema_0.75", "window_1", "window_3"}
    one = tmp_path / "one" / str(alone["hash"])
    assert losses(folder.parent, alone) == pytest.approx(losses(one.parent, alone), rel=1e-5)
    expected = torch.load(last(one), weights_only=True)["averages"]
    torch.testing.assert_close(whole, expected, rtol=1e-4, atol=1e-6)
    last(folder).unlink()
    (folder / "result.json").unlink()
    assert_same_bits(whole, train())
    assert result() == averaged


@pytest.mark.parametrize("start", [0, 1, 4, 5, 12, 13, 40])
@pytest.mark.parametrize("every", [1, 4, 5, 30])
def test_an_average_that_never_is_is_refused(every: int, start: int) -> None:
    averages = Averages(AveragingConfig(every=every, windows=(99,), start=start), Tied())
    for step in range(1, 13):
        averages.update(step)
    samples = len(averages.samples)
    for needed in (1, max(samples, 1), samples + 1):
        config = AveragingConfig(every=every, windows=(needed,), start=start)
        if needed <= samples:
            config.check(12)
            continue
        with pytest.raises(UserError, match=f"needs {needed} samples .* has {samples};"):
            config.check(12)
    AveragingConfig(every=every, start=start).check(12)
    ema = AveragingConfig(every=every, ema=(0.5,), start=start)
    if samples:
        ema.check(12)
    else:
        with pytest.raises(UserError, match="needs 1 samples"):
            ema.check(12)
