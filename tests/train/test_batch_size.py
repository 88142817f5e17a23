"""Batches that grow: by a ramp, or by the norm test."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

from steepest import data
from steepest.errors import UserError
from steepest.train import Progress, RunConfig, Runtime, multiplier, read_metrics, run
from steepest.train.batch_size import BatchConfig, BatchSize
from steepest.train.learner import Learner
from steepest.train.norm_test import WANTED, NormTest
from steepest.train.parallel import Parallel

from .conftest import MakeConfig
from .test_parallel import free_port, one_process
from .test_resume import Stop, assert_same_bits, stop_at

RUNTIME = Runtime(threads=1, log_every=1, checkpoint_every=3)
CPU = torch.device("cpu")
RAMP = {"start_rows": 2, "increment_rows": 2, "ramp_rows": 24}
SHAPE = {"batch_size": 8, "gradient_accumulation": 4, "steps": 10, "every": 4}


def ramped(make_config: MakeConfig, **changes: Any) -> RunConfig:
    return make_config(**{"batch.schedule": "ramp", **RAMP, **SHAPE, **changes})


def norm_tested(make_config: MakeConfig, **changes: Any) -> RunConfig:
    values = {"batch.schedule": "norm_test", "eta": 0.6, "max_rows": 32, **SHAPE, "steps": 20}
    return make_config(**{**values, **changes})


def sizes(batch: BatchSize) -> list[int]:
    found = []
    while not batch.finished:
        found.append(batch.size)
        batch.advance()
    return found


def numbers(folder: Path) -> list[tuple[float, ...]]:
    """Return step, tokens, batch size, loss and what the norm test asked for, of every step."""
    keys = ("step", "tokens", "batch_size", "loss", WANTED)
    records = [r for r in read_metrics(folder / "metrics.jsonl") if r["kind"] == "train"]
    return [tuple(record.get(key, 0.0) for key in keys) for record in records]


def test_a_fixed_batch_is_at_the_number_of_the_step() -> None:
    batch = BatchSize(BatchConfig(), batch_size=7, steps=50)
    for step in range(50):
        assert (batch.size, batch.steps, batch.place) == (7, step, (float(step), 1.0))
        assert batch.expected_steps == 50
        batch.advance(100.0)
    assert batch.finished
    assert batch.size == 0


@pytest.mark.parametrize(
    ("start", "increment", "over", "size"),
    [(2, 2, 24, 8), (16, 16, 5000, 256), (32, 32, 1, 128), (10, 10, 333, 40)],
)
def test_a_ramp_is_that_of_megatron(start: int, increment: int, over: int, size: int) -> None:
    config = BatchConfig("ramp", start_rows=start, increment_rows=increment, ramp_rows=over)
    steps = 2 * over // size + 5
    config.check(size, size // math.gcd(start, increment), steps)
    found = sizes(BatchSize(config, batch_size=size, steps=steps))
    seen = 0
    for rows in found[:-1]:
        each = over / ((size - start) / increment)
        wanted = size if seen > over else start + increment * int(seen / each)
        assert rows == wanted
        seen += rows
    assert sum(found) == size * steps
    assert 0 < found[-1] <= size
    assert found[:-1] == sorted(found[:-1])


def test_the_norm_test_only_grows_in_whole_batches() -> None:
    config = BatchConfig("norm_test", eta=0.5, max_rows=40)
    batch = BatchSize(config, batch_size=8, steps=20)
    found = []
    for wanted in (0.0, 8.0, 8.1, 3.0, 30.0, 1e9, 0.0, 0.0):
        found.append(batch.size)
        batch.advance(wanted)
    assert found == [8, 8, 8, 16, 16, 32, 40, 32]  # the last has the rows that are left
    assert batch.finished


@pytest.mark.parametrize("unequal", [False, True])
def test_the_norm_test_asks_for_what_the_variance_of_rows_does(unequal: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = 0.1 + torch.randn(600, 200, generator=generator, dtype=torch.float64)
    weight = torch.nn.Parameter(torch.zeros(200, dtype=torch.float64))
    test = NormTest(0.7, [weight], Parallel())
    lengths = [5, 15] * 30 if unequal else [10] * 60
    for part in rows.split(lengths):
        share = torch.tensor(len(part) / len(rows))
        weight.grad = share.double() * part.mean(0)
        test.take(share)
    test.put_back()
    mean = rows.mean(0)
    torch.testing.assert_close(weight.grad, mean, rtol=1e-6, atol=1e-8)
    found = test.wanted(mean.norm(), len(rows)).item()
    wanted = rows.var(0).sum().item() / (0.7**2 * mean.square().sum().item())
    assert found == pytest.approx(wanted, rel=0.05)
    if not unequal:  # then it is the plain variance of the parts, to rounding
        means = torch.stack([part.mean(0) for part in rows.split(lengths)])
        variance = 10 * means.var(0).sum() / (0.7**2 * mean.square().sum())
        assert found == pytest.approx(variance.item(), rel=1e-6)


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_a_gradient_that_says_nothing_asks_for_nothing(value: float) -> None:
    weight = torch.nn.Parameter(torch.zeros(3))
    test = NormTest(1.0, [weight], Parallel())
    for _ in range(2):
        weight.grad = torch.full((3,), value)
        test.take(torch.tensor(0.5))
    test.put_back()
    assert test.wanted(weight.grad.norm(), 8).item() == 0.0


def test_comparing_parts_leaves_the_gradient_as_it_was(
    make_config: MakeConfig, corpus: Path
) -> None:
    loader = data.Loader(
        data.prepare(str(corpus), 300).train, batch_size=8, sequence_length=16, seed=0
    )
    plain = Learner(make_config(**SHAPE, clip_norm=0.0), CPU)
    comparing = Learner(norm_tested(make_config, clip_norm=0.0), CPU)
    batch = loader.rows(0)
    results = [learner.gradient(batch) for learner in (plain, comparing)]
    for a, b in zip(plain.parameters, comparing.parameters, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=1e-9)
    assert results[0].loss == results[1].loss
    gradients = []
    for part in plain.parts(batch):
        plain.model.zero_grad()
        plain.model.loss(part.tokens, part.targets).backward()  # type: ignore[no-untyped-call]
        gradients.append(torch.cat([p.grad.flatten() for p in plain.parameters]).double())  # type: ignore[union-attr]
    stacked = torch.stack(gradients)
    wanted = 2 * stacked.var(0).sum() / (0.6**2 * stacked.mean(0).square().sum())
    assert results[1].statistics[WANTED].item() == pytest.approx(wanted.item(), rel=1e-4)


def test_batches_of_any_size_take_the_rows_in_order(corpus: Path) -> None:
    split = data.prepare(str(corpus), 300).train
    loader = data.Loader(split, batch_size=4, sequence_length=64, seed=3)
    epoch = loader.rows_per_epoch
    steps = -(-3 * epoch // 4)
    one_by_one = torch.cat([loader.rows(step).tokens for step in range(steps)])
    row = 0
    for count in (1, 3, 8, epoch, epoch // 2, epoch + 1):
        assert torch.equal(loader.rows_from(row, count).tokens, one_by_one[row : row + count])
        row += count


def test_a_ramped_run_sees_the_tokens_of_a_fixed_one(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    config = ramped(make_config)
    seen: list[Progress] = []
    result = run(config, tmp_path, runtime=RUNTIME, on_progress=seen.append)
    metrics = read_metrics(tmp_path / result["hash"] / "metrics.jsonl")
    records = [record for record in metrics if record["kind"] == "train"]
    assert [record["batch_size"] for record in records][:5] == [2, 2, 2, 2, 4]
    assert [record["step"] for record in records] == list(range(1, result["steps"] + 1))
    rows = 0
    for record in records:
        place, length = rows / 8, record["batch_size"] / 8
        factor = multiplier(place, 10, config.schedule, length)
        assert record["lr"] == pytest.approx(dict.fromkeys(record["lr"], 1e-2 * factor))
        rows += record["batch_size"]
        assert record["tokens"] == rows * 16
    assert rows == 80
    assert records[-1]["lr"]["hidden"] == pytest.approx(1e-3)
    fixed = run(make_config(**SHAPE), tmp_path, runtime=RUNTIME)
    assert result["tokens"] == fixed["tokens"] == 80 * 16
    assert result["steps"] > fixed["steps"] == 10
    assert seen[-1].step == seen[-1].steps == result["steps"]
    evaluations = [record["step"] for record in metrics if record["kind"] == "eval"]
    assert evaluations == [*range(0, result["steps"], 4), result["steps"]]
    assert result["val_loss"] < result["initial_val_loss"]
    assert result["tokens_per_second"] == pytest.approx(
        result["tokens"] / result["steps"] / result["step_ms"] * 1000
    )


def test_the_batch_of_a_run_grows_where_the_gradient_is_noise(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    result = run(norm_tested(make_config), tmp_path, runtime=RUNTIME)
    metrics = read_metrics(tmp_path / result["hash"] / "metrics.jsonl")
    records = [record for record in metrics if record["kind"] == "train"]
    found = [record["batch_size"] for record in records]
    assert found[0] == 8
    assert found[:-1] == sorted(found[:-1])
    assert max(found) > 8
    assert sum(found) == 20 * 8 == result["tokens"] // 16
    assert result["steps"] == len(found) < 20
    largest = 8
    for record, size in zip(records[:-2], found[1:], strict=False):
        asked = -(-record[WANTED] // 8) * 8
        largest = max(largest, min(asked, 32))
        assert size == largest
    quiet = run(norm_tested(make_config, eta=100.0), tmp_path, runtime=RUNTIME)
    assert quiet["steps"] == 20


@pytest.mark.parametrize("kind", [ramped, norm_tested])
def test_resumed_to_the_bit(
    kind: Any, make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = kind(make_config, name="sophia_g", lr=1e-3, options={"update_interval": 2})
    whole = run(config, tmp_path / "whole", runtime=RUNTIME)
    monkeypatch.setattr("steepest.train.loop.PROGRESS_SECONDS", 0)
    with pytest.raises(Stop):
        run(config, tmp_path / "killed", runtime=RUNTIME, on_progress=stop_at(5))
    resumed = run(config, tmp_path / "killed", runtime=RUNTIME)
    assert whole["val_loss"] == resumed["val_loss"]
    final = Path(whole["hash"]) / "checkpoints" / f"step-{whole['steps']:09d}.pt"
    assert_same_bits(
        torch.load(tmp_path / "whole" / final, weights_only=True),
        torch.load(tmp_path / "killed" / final, weights_only=True),
    )
    seen = [numbers(tmp_path / name / str(whole["hash"])) for name in ("whole", "killed")]
    assert seen[0] == seen[1]


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"batch.schedule": "ramp"}, "batch.schedule ramp needs batch.start_rows"),
        ({"eta": 0.5}, "batch.schedule fixed has no batch.eta"),
        ({"batch.schedule": "norm_test", "eta": 0.5}, "needs batch.max_rows"),
        ({"batch.schedule": "norm_test", "eta": 0.0, "max_rows": 8}, "batch.eta must be a pos"),
        ({"batch.schedule": "norm_test", "eta": 1.0, "max_rows": 12}, "a multiple of data.batch"),
        (
            {"batch.schedule": "norm_test", "eta": 1.0, "max_rows": 8, "gradient_accumulation": 1},
            "training.gradient_accumulation must be at least 2",
        ),
        ({"batch.schedule": "ramp", **RAMP, "start_rows": 1}, "must be a multiple of 2, the rows"),
        ({"batch.schedule": "ramp", **RAMP, "start_rows": 8}, "some increments must lead"),
        ({"batch.schedule": "ramp", **RAMP, "increment_rows": 4}, "some increments must lead"),
        ({"batch.schedule": "ramp", **RAMP, "ramp_rows": 81}, "more than the run's 80"),
    ],
)
def test_what_does_not_fit_is_said(
    values: dict[str, Any], sentence: str, make_config: MakeConfig
) -> None:
    with pytest.raises(UserError, match=sentence):
        make_config(**{**SHAPE, **values})


def test_processes_must_share_every_batch() -> None:
    ramp = BatchConfig("ramp", **RAMP)
    BatchSize(ramp, batch_size=8, steps=5, processes=2)
    with pytest.raises(UserError, match="multiples of 2 rows can't be shared equally by 4"):
        BatchSize(ramp, batch_size=8, steps=5, processes=4)


@pytest.mark.slow
def test_replicas_take_the_batches_of_one_process(make_config: MakeConfig, tmp_path: Path) -> None:
    configs = [ramped(make_config), norm_tested(make_config)]
    jobs, alone = [], []
    for number, config in enumerate(configs):
        file = tmp_path / f"{number}.toml"
        file.write_text(config.to_toml())
        jobs.append(f"ddp\n{file}")
        alone.append(run(config, tmp_path / "one", runtime=RUNTIME))
    mp.spawn(one_process, args=(2, free_port(), str(tmp_path), jobs), nprocs=2)
    for result in alone:
        one, two = (numbers(tmp_path / way / str(result["hash"])) for way in ("one", "ddp"))
        assert [step[:3] for step in one] == [step[:3] for step in two]
        for a, b in zip(one, two, strict=True):
            assert a[3:] == pytest.approx(b[3:], rel=1e-3)
