"""The plan of a run against what the run then does."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from steepest import models
from steepest.errors import UserError
from steepest.models import cross_entropy
from steepest.train import RunConfig, Runtime, measuring, planning, read_metrics, run
from steepest.train.activations import activation_bytes
from steepest.train.learner import Learner
from steepest.train.peaks import peak_of, peaks

from .conftest import MakeConfig

CPU = torch.device("cpu")
DEEP = {"layers": 6, "hidden_size": 32}


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "muon", "every": 7, "at": (10, 15), "train_tokens": 64},
        {"name": "adamw", "wrap": ("cautious",), "precision": "pure_bfloat16_kahan"},
        {"name": "soap", "gradient_accumulation": 2, "ema": (0.9,), "windows": (1, 2)},
        {"name": "adafactor", "batch.schedule": "ramp", "start_rows": 1, "increment_rows": 1,
         "ramp_rows": 24, "gradient_accumulation": 4},
    ],
    ids=lambda changes: changes["name"],
)  # fmt: skip
def test_a_plan_is_what_the_run_does(
    changes: dict[str, Any], make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config(steps=20, **changes)
    plan = planning.plan(config)
    result = run(config, tmp_path, runtime=Runtime(log_every=1))
    assert plan.parameters.total == result["parameters"]
    assert plan.flops_per_token == result["flops_per_token"]
    assert (plan.tokens, plan.steps) == (result["tokens"], result["steps"])
    assert plan.memory.weights == result["memory_bytes"]["weights"]
    assert plan.memory.gradients == result["memory_bytes"]["gradients"]
    assert plan.memory.averages == result["memory_bytes"]["averages"]
    assert plan.memory.optimizer_state == result["state_bytes"]
    records = read_metrics(tmp_path / result["hash"] / "metrics.jsonl")
    assert plan.evaluations == sum(record["kind"] == "eval" for record in records)


def allocated(config: RunConfig) -> int:
    """Return the most that forward and backward pass really hold, as the CPU's allocator tells."""
    learner = Learner(config, CPU)
    batch = measuring._random_batch(config, config.data.batch_size, CPU)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        learner.gradient(batch)
    gradients = 4 * sum(p.numel() for p in learner.parameters)
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    now, most = 0, 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    assert most > gradients
    return most


@pytest.mark.parametrize("packing", ["contiguous", "documents"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_activations_are_those_of_a_real_pass(
    packing: str, precision: str, make_config: MakeConfig
) -> None:
    rows = {"packing": packing, "batch_size": 16, "sequence_length": 64}
    config = make_config(**DEEP, **rows, precision=precision)
    assert activation_bytes(config) == pytest.approx(allocated(config), rel=0.1)


@pytest.mark.parametrize("name", ["llama", "gpt2", "moe", "gla"])
def test_further_layers_take_as_much_as_the_first(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, _ = models.ARCHITECTURES[name]
    data = dataclasses.replace(RunConfig().data, batch_size=2, sequence_length=16)
    config = RunConfig(model=kind(layers=5), data=data)
    extrapolated = activation_bytes(config)
    monkeypatch.setattr("steepest.train.activations.COUNTED_LAYERS", (2, 5))
    assert activation_bytes(config) == extrapolated


def test_recomputing_and_parts_save_activations(make_config: MakeConfig) -> None:
    whole = activation_bytes(make_config(**DEEP, batch_size=16))
    assert activation_bytes(make_config(**DEEP, batch_size=16, gradient_accumulation=4)) < whole / 2
    assert activation_bytes(make_config(**DEEP, batch_size=16, recompute_activations=True)) < whole


def test_the_loss_on_a_gpu_has_larger_chunks(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    vocabulary = {"model.vocab_size": 5000, "data.vocab_size": 5000}
    config = make_config(**vocabulary, batch_size=32, sequence_length=64, precision="float32")
    on_gpu = activation_bytes(config, "cuda")
    assert on_gpu > activation_bytes(config, "cpu")
    monkeypatch.setitem(cross_entropy.CHUNK_TOKENS, "cpu", cross_entropy.CHUNK_TOKENS["cuda"])
    assert on_gpu == pytest.approx(activation_bytes(config, "cpu"), rel=0.1)


def test_gpus(make_config: MakeConfig) -> None:
    plan = planning.plan(make_config(name="adamw", steps=20))
    assert all(8 <= peak.memory_gib <= 200 for peak in peaks())
    found = planning.find_gpus(["a100-sxm4-80gb", "H200", "NVIDIA H200", "RTX 30"])
    names = ["A100-SXM4-80GB", "H200", *(f"GeForce RTX {n}" for n in ("3080", "3090", "3090 Ti"))]
    assert list(found) == [f"NVIDIA {name}" for name in names]
    assert set(planning.find_gpus(["h200 n"])) == {"NVIDIA H200 NVL"}
    peak = found["NVIDIA H200"]
    estimate = planning.on_gpu(plan, "NVIDIA H200", peak, 0.5)
    flops = plan.training_flops + plan.evaluation_flops
    assert estimate.seconds == pytest.approx(flops / (0.5 * 989.4e12))
    assert estimate.joules == pytest.approx(700 * estimate.seconds)
    assert estimate.fits
    total = plan.gpu_memory.total
    assert total is not None
    assert estimate.memory_bytes == 141 * 2**30
    small = dataclasses.replace(peak, memory_gib=total / 2**30)
    assert planning.on_gpu(plan, "small", small, 0.5).fits is False
    with pytest.raises(UserError, match="H100"):
        planning.find_gpus(["H1000"])
    for mfu in (0.0, 1.5, float("nan")):
        with pytest.raises(UserError, match="above 0 and at most 1"):
            planning.on_gpu(plan, "NVIDIA H200", peak, mfu)


@pytest.mark.parametrize(
    ("name", "units", "operations", "boost"),
    [
        ("NVIDIA H100 80GB HBM3", 132, 4096, 1.83),
        ("NVIDIA H100 PCIe", 114, 4096, 1.62),
        ("NVIDIA H200", 132, 4096, 1.83),
        ("NVIDIA A100-SXM4-80GB", 108, 2048, 1.41),
        ("NVIDIA A100-PCIE-40GB", 108, 2048, 1.41),
        ("NVIDIA A30", 56, 2048, 1.44),
        ("NVIDIA A40", 84, 1024, 1.74),
        ("NVIDIA A10", 72, 1024, 1.695),
        ("NVIDIA RTX A6000", 84, 1024, 1.8),
        ("NVIDIA L4", 58, 1024, 2.04),
        ("NVIDIA L40", 142, 512, 2.49),
        ("NVIDIA GeForce RTX 3080", 68, 512, 1.71),
        ("NVIDIA GeForce RTX 3090", 82, 512, 1.695),
        ("NVIDIA GeForce RTX 3090 Ti", 84, 512, 1.86),
        ("NVIDIA GeForce RTX 4080", 76, 512, 2.505),
        ("NVIDIA GeForce RTX 4090", 128, 512, 2.52),
        ("NVIDIA GeForce RTX 5090", 170, 512, 2.407),
    ],
)
def test_peaks_follow_from_units_and_clocks(
    name: str, units: int, operations: int, boost: float
) -> None:
    """Multiprocessors, dense bf16 operations that one does in a cycle, and the clock in GHz."""
    peak = peak_of(name)
    assert peak is not None
    assert peak.bf16_tflops == pytest.approx(units * operations * boost / 1000, rel=0.005)


@pytest.mark.parametrize("every", [1, 7, 20, 50])
@pytest.mark.parametrize("at", [(), (1, 7, 19), (20,)])
def test_evaluations_are_counted_without_listing_them(
    every: int, at: tuple[int, ...], make_config: MakeConfig
) -> None:
    config = make_config(name="adamw", steps=20, every=every, at=at)
    assert planning.plan(config).evaluations == len({*range(0, 21, every), *at, 20})
    long = dataclasses.replace(config.training, steps=10**15)
    long_config = dataclasses.replace(config, training=long)
    assert planning.plan(long_config).evaluations == pytest.approx(10**15 / every)


def test_evaluation_is_measured(make_config: MakeConfig) -> None:
    config = make_config(name="adamw", batch_size=8, sequence_length=64)
    learner = Learner(config, CPU)
    model, _, _ = measuring._timed(learner, 8, 0.1, 10)
    weights = [p.detach().clone() for p in learner.parameters]
    assert 0 < measuring._evaluation_seconds(learner, 8) < 2 * model
    assert learner.model.training
    for before, after in zip(weights, learner.parameters, strict=True):
        assert torch.equal(before, after)


def test_measuring_scales_a_part_to_the_run(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "_evaluation_seconds", lambda _, rows: 16 * rows * 1e-3)
    config = make_config(steps=40, batch_size=8, gradient_accumulation=2)
    plan = planning.plan(config)
    assert measuring.refusal(config, plan, CPU) == ""
    found = measuring.measure(config, plan, CPU)
    assert (found.rows, found.fits) == (4, True)
    assert 1 <= found.steps <= 40
    assert found.tokens_per_second == pytest.approx(8 * 16 / found.step_seconds)
    evaluation = 1e-3 * plan.evaluation_tokens
    assert found.seconds == pytest.approx(40 * found.step_seconds + evaluation)


def test_the_state_of_a_class_of_ones_own_is_measured(
    momentum_file: Path, make_config: MakeConfig
) -> None:
    config = make_config(name=f"{momentum_file}:Momentum", lr=0.1)
    plan = planning.plan(config)
    assert plan.memory.total is None
    plan = planning.with_state(plan, measuring.measure(config, plan, CPU).state_bytes)
    assert plan.memory.optimizer_state == 8 * plan.parameters.total


def test_large_models_are_planned_and_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.size("llama-7b")
    data = dataclasses.replace(RunConfig().data, vocab_size=model.vocab_size)
    config = RunConfig(model=model, data=data)
    plan = planning.plan(config)
    assert plan.memory.weights == 4 * plan.parameters.total
    monkeypatch.setattr(measuring, "_memory", lambda _: 32e9)
    assert "more than half of its 32.0 GB" in measuring.refusal(config, plan, CPU)
    monkeypatch.setattr(measuring, "_memory", lambda _: 1e15)
    monkeypatch.setattr(measuring, "_flops_per_second", lambda _: 1e10)
    assert "one row's forward and backward pass takes about" in measuring.refusal(config, plan, CPU)


def test_energy_is_read_from_the_processors(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(measuring, "RAPL", tmp_path)
    assert measuring._processor_joules() is None
    for package in (0, 1):
        (tmp_path / f"intel-rapl:{package}").mkdir()
        (tmp_path / f"intel-rapl:{package}/energy_uj").write_text("1500000\n")
    assert measuring._processor_joules() == 3.0
    assert measuring._watts(CPU, 1.0, 4.0) == 0.5
    assert measuring._watts(CPU, 5.0, 4.0) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "muonn"}, "did you mean 'muon'"),
        ({"name": "adamw", "options": {"rank": 4}}, "rank"),
        ({"corpus": "nowhere"}, "neither an embedded corpus"),
    ],
)
def test_what_cannot_be_run_cannot_be_planned(
    changes: dict[str, Any], message: str, make_config: MakeConfig
) -> None:
    with pytest.raises(UserError, match=message):
        planning.plan(make_config(**changes))
