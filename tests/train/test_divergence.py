"""Divergence is a result, not an exception; a spike is neither."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from steepest.cli import train
from steepest.train import Runtime, read_metrics, run
from steepest.train.divergence import DivergenceMonitor, of_validation

from .conftest import MakeConfig


def first_alarm(losses: list[float], steps: int, warmup: int) -> int | None:
    monitor = DivergenceMonitor(steps, warmup)
    for step, loss in enumerate(losses, start=1):
        if (divergence := monitor.update(step, loss)) is not None:
            assert divergence.step == step
            return step
    return None


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_the_end_even_in_warmup(bad: float) -> None:
    assert first_alarm([7.0, 6.9, bad], steps=100, warmup=50) == 3
    divergence = of_validation(8, bad)
    assert divergence is not None
    assert divergence.step == 8
    assert of_validation(8, 5.0) is None


def test_steps_skipped_in_a_row_are_the_end_and_single_ones_are_not() -> None:
    monitor = DivergenceMonitor(100, 0, patience=5)
    for step in range(1, 31):  # five of six
        assert monitor.update(step, 5.0, math.nan if step % 6 else 1.0) is None
    for step in range(31, 36):
        assert monitor.update(step, math.nan if step % 2 else 5.0, math.nan) is None
    divergence = monitor.update(36, 5.0, math.inf)
    assert divergence is not None
    assert divergence.reason == (
        "The gradient was not finite at step 36, the last of 6 skipped steps in a row."
    )
    assert DivergenceMonitor(100, 0).update(1, 5.0, math.nan) is None  # the next loss shows it


@pytest.mark.parametrize("nonfinite", ["propagate", "skip"])
def test_an_optimizer_with_extra_gradients_diverges_like_others(
    nonfinite: str, make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config(
        name="sophia_g", lr=1e6, options={"update_interval": 1}, nonfinite=nonfinite, steps=60
    )
    result = run(config, tmp_path, runtime=Runtime(threads=1))
    assert (result["status"], result["val_loss"]) == ("diverged", None)
    if nonfinite == "skip":
        last = f"the last of {result['skipped_steps']} skipped steps in a row."
        assert result["reason"].endswith(last)


def test_an_average_that_is_not_finite_ends_no_run(make_config: MakeConfig, tmp_path: Path) -> None:
    """Lookahead evaluates weights that are still finite where those in training are not."""
    config = make_config(
        name="sgd", wrap=("lookahead",), lr=1e38, warmup_steps=0, every=1, clip_norm=0.0,
        **{"averaging.ema": (0.5,), "averaging.every": 1},
    )  # fmt: skip
    result = run(config, tmp_path, runtime=Runtime(threads=1))
    assert result["reason"] == "The training loss was nan at step 2."
    assert train._ending(result, tmp_path) == (
        f"sgd diverged: The training loss was nan at step 2. {tmp_path / result['hash']}"
    )
    records = read_metrics(tmp_path / result["hash"] / "metrics.jsonl")
    (last,) = [r for r in records if r["kind"] == "eval" and r["step"] == 1]
    assert math.isfinite(last["val_loss"])
    for name in ("averaged", "averaged_perplexity", "averaged_bits_per_byte"):
        assert last[name] == {"ema_0.5": None}


def test_a_loss_that_stays_up_is_the_end_after_a_window_after_warmup() -> None:
    high = [7.0] + [9.0] * 199
    assert first_alarm(high, steps=50, warmup=30) == 30 + 20  # 20 steps at least
    assert first_alarm(high, steps=200, warmup=30) == 30 + 40  # 20 % of them
    assert first_alarm(high[:69], steps=200, warmup=30) is None


@pytest.mark.parametrize(
    "losses",
    [
        [7.0] + [7.9] * 199,  # learns nothing, but within the margin
        [7.0] * 60 + [1e6] * 8 + [6.0] * 132,  # a spike that would carry a mean
        ([7.0] + [6.0, 20.0] * 100)[:200],  # as often good as bad
        [7.0] * 20 + [12.0] * 39 + [6.5] * 141,  # comes back within the window
    ],
)
def test_no_false_alarm(losses: list[float]) -> None:
    assert first_alarm(losses, steps=200, warmup=10) is None


def test_the_state_continues_where_it_was() -> None:
    losses = [7.0] + [9.0] * 60
    first = DivergenceMonitor(100, 10)
    for step in range(1, 21):
        assert first.update(step, losses[step - 1]) is None
    second = DivergenceMonitor(100, 10)
    second.load_state_dict(first.state_dict())
    alarms = [step for step in range(21, 61) if second.update(step, losses[step - 1])]
    assert alarms[0] == first_alarm(losses, 100, 10)


@pytest.mark.parametrize(("name", "lr"), [("SGD", 1e3), ("AdamW", 1e4)])  # high, not finite
def test_a_huge_lr_gives_a_result(
    name: str, lr: float, make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config(name=f"torch.optim:{name}", lr=lr, steps=60)
    result = run(config, tmp_path, runtime=Runtime(checkpoint_every=5, log_every=1))
    assert result["status"] == "diverged"
    assert result["val_loss"] is None
    assert result["val_perplexity"] is None
    assert result["val_bits_per_byte"] is None
    assert 1 <= result["diverged_at_step"] < 60
    assert result["steps"] == result["diverged_at_step"]
    assert f"at step {result['diverged_at_step']}" in result["reason"]
    folder = tmp_path / result["hash"]
    assert json.loads((folder / "result.json").read_text()) == result
    for record in read_metrics(folder / "metrics.jsonl"):
        assert math.isfinite(record.get("loss", record.get("val_loss")))
    assert run(config, tmp_path) == result
