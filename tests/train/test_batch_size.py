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
from steepest.train import Progress, RunConfig, Runtime, multiplier, read_metrics, resolve, run
from steepest.train.batch_size import BatchConfig, BatchSize
from steepest.train.learner import Learner
from steepest.train.norm_test import WANTED, NormTest, of
from steepest.train.parallel import Parallel
from steepest.train.resolving import open_data

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


class Vector(torch.nn.Module):
    """A loss whose gradient is the mean of rows."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(size, dtype=torch.float64))

    def take(self, test: NormTest, rows: torch.Tensor, of: int) -> None:
        """Let a test see the gradient of some rows of as many as `of`."""
        share = torch.tensor(len(rows) / of, dtype=torch.float64)
        mean = rows.sum(0) / max(len(rows), 1)
        (share * (self.weight @ mean)).backward()  # type: ignore[no-untyped-call]
        test.take(share)


@pytest.mark.parametrize("lengths", [[10] * 60, [5, 15] * 30, [10, 0, 10] * 30])
def test_the_norm_test_asks_for_what_the_variance_of_rows_does(lengths: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = 0.1 + torch.randn(600, 200, generator=generator, dtype=torch.float64)
    model = Vector(200)
    test = NormTest(0.7, model, Parallel())
    for again in range(2):
        model.zero_grad()
        test.begin()
        for part in rows.split(lengths):
            model.take(test, part, len(rows))
        mean = rows.mean(0)
        torch.testing.assert_close(model.weight.grad, mean)
        found = test.wanted(mean.norm(), len(rows)).item()
        wanted = rows.var(0).sum().item() / (0.7**2 * mean.square().sum().item())
        assert found == pytest.approx(wanted, rel=0.05), again
        # Parts without rows tell nothing; between equal parts it is their plain variance.
        means = torch.stack([part.mean(0) for part in rows.split(lengths) if len(part)])
        variance = 10 * means.var(0).sum() / (0.7**2 * mean.square().sum())
        if 5 not in lengths:
            assert found == pytest.approx(variance.item(), rel=1e-6)


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_a_gradient_that_says_nothing_asks_for_nothing(value: float) -> None:
    model = Vector(3)
    test = NormTest(1.0, model, Parallel())
    for _ in range(2):
        model.take(test, torch.full((1, 3), value, dtype=torch.float64), 2)
    assert model.weight.grad is not None
    assert test.wanted(model.weight.grad.norm(), 8).item() == 0.0


def asked_by_hand(learner: Learner, batch: data.Batch) -> float:
    """Return the rows that the norm test asks for, from the gradients of all parts."""
    gradients = []
    for part in learner.parts(batch):
        learner.model.zero_grad()
        learner.model.loss(part.tokens, part.targets).backward()  # type: ignore[no-untyped-call]
        gradients.append(torch.cat([p.grad.flatten() for p in learner.parameters]).double())  # type: ignore[union-attr]
    stacked = torch.stack(gradients)
    return (2 * stacked.var(0).sum() / (0.6**2 * stacked.mean(0).square().sum())).item()


@pytest.mark.parametrize("tied", [False, True])
def test_comparing_parts_leaves_the_gradient_as_it_was(
    tied: bool, make_config: MakeConfig, corpus: Path
) -> None:
    loader = data.Loader(
        data.prepare(str(corpus), 300).train, batch_size=8, sequence_length=16, seed=0
    )
    choices = {**SHAPE, "clip_norm": 0.0, "tie_embeddings": tied}
    plain = Learner(make_config(**choices), CPU)
    comparing = Learner(norm_tested(make_config, **choices), CPU)
    for step in range(2):
        batch = loader.rows(step)
        results = [learner.gradient(batch) for learner in (plain, comparing)]
        for a, b in zip(plain.parameters, comparing.parameters, strict=True):
            assert a.grad is not None
            assert b.grad is not None
            assert torch.equal(a.grad, b.grad)
        assert results[0].loss == results[1].loss
        asked = results[1].statistics[WANTED].item()
        assert asked == pytest.approx(asked_by_hand(plain, batch), rel=1e-4)


@pytest.mark.parametrize("choice", ["compiled", "q_apollo", "pure_bfloat16"])
def test_the_norm_test_sees_gradients_however_they_are_made(
    choice: str, make_config: MakeConfig
) -> None:
    int8 = {"name": "q_apollo", "options": {"group_size": 16}} if choice == "q_apollo" else {}
    numbers = {"precision": choice} if choice.startswith("pure") else {}
    learner = Learner(norm_tested(make_config, clip_norm=0.0, **int8, **numbers), CPU)
    if choice == "compiled":
        objective: Any = learner._objective
        objective.forward = torch.compile(objective.forward, backend="aot_eager", dynamic=False)
    torch.manual_seed(0)
    batch = data.Batch(*torch.randint(300, (2, 8, 16)))
    found = learner.gradient(batch).statistics[WANTED].item()
    assert found == pytest.approx(asked_by_hand(learner, batch), rel=1e-2 if numbers else 1e-5)


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


def test_an_optimizer_is_told_the_steps_of_a_ramp(make_config: MakeConfig) -> None:
    tokens = open_data(make_config().data)
    fixed = resolve(make_config(name="ademamix", **SHAPE), tokens)
    longer = resolve(ramped(make_config, name="ademamix"), tokens)
    assert fixed.optimizer.options["alpha_warmup"] == 10
    assert longer.optimizer.options["alpha_warmup"] == 15  # 4 of 2 rows, 2 of 4, 2 of 6, 7 of 8


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
def test_processes_take_the_batches_of_one(make_config: MakeConfig, tmp_path: Path) -> None:
    configs = [norm_tested(make_config, packing="documents"), ramped(make_config)]
    jobs, alone = [], []
    for number, config in enumerate(configs):
        file = tmp_path / f"{number}.toml"
        file.write_text(config.to_toml())
        jobs += [f"{way}\n{file}" for way in ("ddp", "fsdp")]
        alone.append(run(config, tmp_path / "one", runtime=RUNTIME))
    mp.spawn(one_process, args=(2, free_port(), str(tmp_path), jobs), nprocs=2)
    for result in alone:
        one = numbers(tmp_path / "one" / str(result["hash"]))
        for way in ("ddp", "fsdp"):
            together = numbers(tmp_path / way / str(result["hash"]))
            assert [step[:3] for step in one] == [step[:3] for step in together]
            for a, b in zip(one, together, strict=True):
                assert a[3:] == pytest.approx(b[3:], rel=1e-5)


def test_processes_must_share_the_parts_of_a_norm_test(make_config: MakeConfig) -> None:
    config = norm_tested(make_config, batch_size=12, max_rows=24, gradient_accumulation=3)

    class Two(Parallel):
        world_size = 2

    model = Vector(1)
    assert of(config, model, Parallel()) is not None
    assert of(make_config(), model, Two()) is None
    with pytest.raises(UserError, match="compares 3 parts of a batch, which 2 processes cannot"):
        of(config, model, Two())
