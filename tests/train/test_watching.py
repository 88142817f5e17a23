"""What a run tells beside its losses, and that telling changes nothing."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from steepest import models
from steepest.data import Batch
from steepest.errors import UserError
from steepest.train import Progress, Runtime, memory, optimizers, read_metrics, run
from steepest.train.learner import Learner
from steepest.train.loop import Training
from steepest.train.peaks import peak_of, peaks, utilisation
from steepest.train.progress import Pace, seconds_left
from steepest.train.timing import StepClock
from steepest.train.watching import Watch

from .conftest import MakeConfig

CPU = torch.device("cpu")
PLAIN = Runtime(threads=1, log_every=3, checkpoint_every=0)
WATCHED = Runtime(threads=1, log_every=1, checkpoint_every=0, dynamics_every=2)


def losses(folder: Path) -> list[float]:
    records = read_metrics(folder / "metrics.jsonl")
    return [r["val_loss"] for r in records if r["kind"] == "eval"]


@pytest.mark.parametrize("name", ["muon", "schedulefree_adamw", "torch.optim:AdamW"])
def test_watching_changes_no_bit(name: str, make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(name=name, steps=8, every=4)
    plain = run(config, tmp_path / "0", runtime=PLAIN)
    run(config, tmp_path / "2", runtime=WATCHED)
    folders = [tmp_path / "0" / plain["hash"], tmp_path / "2" / plain["hash"]]
    assert losses(folders[0]) == losses(folders[1])
    assert not (folders[0] / "dynamics.jsonl").exists()

    records = read_metrics(folders[1] / "dynamics.jsonl")
    parameters = dict(models.build(config.model).named_parameters())
    assert [r["step"] for r in records] == [s for s in (2, 4, 6, 8) for _ in parameters]
    for record in records:
        shape = parameters[record["name"]].shape
        assert record["layer"] == (0 if ".0." in record["name"] else None)
        assert ("stable_rank" in record) == (len(shape) > 1) == (record["role"] != "vector")
        assert 0 <= record["sign_agreement"] <= 1
        assert record["gradient_norm"] > 0
        assert record["relative_update"] * record["weight_norm"] == pytest.approx(
            record["update_norm"]
        )
        if len(shape) > 1:
            assert 1 <= record["stable_rank"] <= min(shape) + 1e-6
            assert record["spectral_norm"] <= record["weight_norm"] * (1 + 1e-6)
        assert ("gradient_momentum_alignment" in record) == plain["optimizer"].startswith(
            ("muon", "torch")
        )
    clipped = {
        r["step"]: r["clipped_grad_norm"]
        for r in read_metrics(folders[1] / "metrics.jsonl")
        if r["kind"] == "train"
    }
    for step in (2, 4, 6, 8):
        squares = [r["gradient_norm"] ** 2 for r in records if r["step"] == step]
        assert sum(squares) ** 0.5 == pytest.approx(clipped[step], rel=1e-5)


def test_a_watched_step_is_measured_on_what_the_optimizer_saw(make_config: MakeConfig) -> None:
    learner = Learner(make_config(name="muon", clip_norm=0.01), CPU)
    watch = Watch(learner, Runtime(), None, 0)
    batch = torch.randint(300, (2, 4, 16), generator=torch.Generator().manual_seed(0))
    for step in (1, 2):  # the first of a warmup
        before = {p: p.detach().clone() for p in learner.parameters}
        watch.before(step, logged=step == 2)
        learner.step(Batch(*batch), StepClock(CPU))
        moved = watch.after(step)
    assert set(moved) == set(learner.roles.values())
    for role, ratio in moved.items():
        mine = [p for p in learner.parameters if learner.roles[p] == role]
        moves = torch.cat([(p - before[p]).flatten() for p in mine]).norm()
        weights = torch.cat([before[p].flatten() for p in mine]).norm()
        assert ratio.item() == pytest.approx((moves / weights).item(), rel=1e-5)


def test_a_closure_is_measured_on_the_gradient_that_it_computes(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config(name="torch.optim:LBFGS", lr=1e-3, steps=2, warmup_steps=0)
    result = run(config, tmp_path, runtime=Runtime(threads=1, dynamics_every=1))
    records = read_metrics(tmp_path / result["hash"] / "dynamics.jsonl")
    assert all(record["gradient_norm"] > 0 for record in records)


def test_records_have_times_and_memory(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(name="adamw", steps=12, every=6)
    seen: list[Progress] = []
    result = run(config, tmp_path, runtime=WATCHED, on_progress=seen.append)
    records = read_metrics(tmp_path / result["hash"] / "metrics.jsonl")
    train = [r for r in records if r["kind"] == "train"]
    assert [("memory_bytes" in r) for r in train] == [True] + [False] * 11
    evaluations = [r["memory_bytes"] for r in records if r["kind"] == "eval"]
    assert [m["optimizer_state"] > 0 for m in evaluations] == [False, True, True]
    assert evaluations[-1]["peak"] >= train[0]["memory_bytes"]["peak"] > 0
    elapsed = [*(r["elapsed_seconds"] for r in records), result["elapsed_seconds"]]
    assert elapsed == sorted(elapsed)
    for told in (*records, result):
        assert 0 < sum(told["part_seconds"].values()) <= told["elapsed_seconds"]
    for name in ("data", "model", "optimizer", "evaluation"):
        seconds = [r["part_seconds"][name] for r in records]
        assert seconds == sorted(seconds)
        assert 0 < seconds[-1] <= result["part_seconds"][name] + 1e-6
    parts = result["part_seconds"]
    assert parts["checkpoint"] == 0  # there is none
    steps = parts["data"] + parts["model"] + parts["optimizer"]
    assert 0.5 * result["seconds"] < steps <= result["seconds"]

    memory = result["memory_bytes"]
    size = result["parameter_bytes"]
    assert (memory["weights"], memory["gradients"], memory["averages"]) == (size, size, 0)
    assert memory["optimizer_state"] == pytest.approx(2 * size, rel=0.01)
    assert memory["peak"] > 4 * size
    assert "activations" not in memory  # a process has more than tensors
    assert (result["loss_spikes"], result["skipped_steps"], result["mfu"]) == (0, 0, None)
    assert all(r["update_ratio"].keys() == r["lr"].keys() for r in train)
    assert seen[-1].seconds_left == 0
    assert seen[-1].tokens_per_second == result["tokens_per_second"]
    assert result["flops_per_token"] == models.training_flops_per_token(config.model, 16)


def test_records_have_what_numpy_counts(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Norms are of gradients before and after clipping; lr is what the optimizer steps with."""
    config = make_config(name="muon", options={"adam_lr": 3e-3}, steps=6, clip_norm=0.2, every=3)
    clip = torch.nn.utils.clip_grads_with_norm_
    build = optimizers.build
    seen: dict[str, list[Any]] = {"before": [], "after": [], "lr": []}

    def norm(gradients: Iterable[torch.Tensor]) -> float:
        squares = [float((g.double().numpy() ** 2).sum()) for g in gradients]
        return math.sqrt(sum(squares))

    def clipping(parameters: list[torch.Tensor], *args: Any, **kwargs: Any) -> None:
        seen["before"].append(norm(p.grad for p in parameters if p.grad is not None))
        clip(parameters, *args, **kwargs)

    def built(*args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        optimizer = build(*args, **kwargs)

        def stepping(*_: object) -> None:
            given = [p for group in optimizer.param_groups for p in group["params"]]
            seen["after"].append(norm(p.grad for p in given))
            seen["lr"].append({float(group["lr"]) for group in optimizer.param_groups})

        optimizer.register_step_pre_hook(stepping)
        return optimizer

    monkeypatch.setattr(torch.nn.utils, "clip_grads_with_norm_", clipping)
    monkeypatch.setattr(optimizers, "build", built)
    result = run(config, tmp_path, runtime=WATCHED)
    records = read_metrics(tmp_path / result["hash"] / "metrics.jsonl")
    train = [r for r in records if r["kind"] == "train"]
    assert [r["grad_norm"] for r in train] == pytest.approx(seen["before"], rel=1e-5)
    assert [r["clipped_grad_norm"] for r in train] == pytest.approx(seen["after"], rel=1e-5)
    assert any(r["grad_norm"] > 2 * r["clipped_grad_norm"] for r in train)
    for record, lrs in zip(train, seen["lr"], strict=True):
        assert set(record["lr"].values()) == lrs
    assert train[-2]["lr"]["hidden"] / train[-2]["lr"]["head"] == pytest.approx(1e-2 / 3e-3)
    assert [r["tokens"] for r in train] == [4 * 16 * step for step in range(1, 7)]
    for record in records:
        assert {"kind", "step", "tokens", "seconds"} <= record.keys()
        finite_everywhere(record)


def finite_everywhere(value: Any) -> None:
    for part in value.values():
        if isinstance(part, dict):
            finite_everywhere(part)
        else:
            assert isinstance(part, str) or math.isfinite(part)


@pytest.mark.slow
def test_the_peak_of_a_process_is_its_own() -> None:
    """Linux lets a process begin with the ru_maxrss of the one that started it."""
    held = bytearray(b"x") * (300 << 20)
    program = "from steepest.train.memory import _peak_resident; print(_peak_resident())"
    child = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    assert int(child.stdout) < memory._peak_resident() - len(held) // 2


def test_dynamics_of_lost_steps_are_written_once(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(steps=8, name="adamw")
    runtime = Runtime(threads=1, dynamics_every=1, checkpoint_every=3)
    whole = run(config, tmp_path / "whole", runtime=runtime)

    class Killed(Exception):
        pass

    def killing(self: Training, phase: str, **_: bool) -> None:
        if self.step == 5:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Training, "report", killing)
        with pytest.raises(Killed):
            run(config, tmp_path / "killed", runtime=runtime)
    lost = read_metrics(tmp_path / "killed" / whole["hash"] / "dynamics.jsonl")
    assert lost[-1]["step"] == 5
    run(config, tmp_path / "killed", runtime=runtime)
    texts = [
        (tmp_path / way / whole["hash"] / "dynamics.jsonl").read_text()
        for way in ("whole", "killed")
    ]
    assert texts[0] == texts[1]


def test_gradients_that_are_not_finite_are_skipped_and_counted(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loss of infinity at steps 4 and 5 ends one run and is survived by the other."""
    original, broken = models.LanguageModel.objective, []

    def objective(self: models.LanguageModel, *args: object, **kwargs: object) -> models.Loss:
        loss = original(self, *args, **kwargs)  # type: ignore[arg-type]
        broken.append(0)
        factor = torch.inf if len(broken) in (4, 5) else 1.0
        return loss._replace(
            objective=loss.objective * factor, cross_entropy=loss.cross_entropy * factor
        )

    monkeypatch.setattr(models.LanguageModel, "objective", objective)
    lost = run(make_config(name="muon", steps=8), tmp_path, runtime=PLAIN)
    assert (lost["status"], lost["diverged_at_step"]) == ("diverged", 4)
    assert lost["loss_spikes"] == 1
    broken.clear()
    saved = run(make_config(name="muon", steps=8, nonfinite="skip"), tmp_path, runtime=WATCHED)
    assert saved["status"] == "finished"
    assert (saved["skipped_steps"], saved["loss_spikes"]) == (2, 1)
    records = read_metrics(tmp_path / saved["hash"] / "metrics.jsonl")
    steps = {r["step"]: r["skipped_steps"] for r in records if r["kind"] == "train"}
    assert steps == {1: 0, 2: 0, 3: 0, 6: 2, 7: 2, 8: 2}
    assert json.loads((tmp_path / saved["hash"] / "result.json").read_text()) == saved


def test_an_optimizer_that_cannot_skip_says_so(make_config: MakeConfig) -> None:
    with pytest.raises(UserError, match=r"AdamW cannot skip steps, so training\.nonfinite must"):
        Learner(make_config(nonfinite="skip"), CPU)


def test_peaks_are_of_whole_gpus() -> None:
    for name, tflops in (
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989.4),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA GeForce RTX 4090", 165.2),
    ):
        found = peak_of(name)
        assert found is not None
        assert found.bf16_tflops == tflops
    for name in (
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "Tesla T4",
    ):
        assert peak_of(name) is None
    names = [name for peak in peaks() for name in peak.names]
    assert len(set(names)) == len(names)
    assert all(peak.watts > 50 and peak.source for peak in peaks())


def test_utilisation(monkeypatch: pytest.MonkeyPatch) -> None:
    assert utilisation(1e6, 1e9, CPU) is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100-SXM4-80GB")
    gpu = torch.device("cuda", 0)
    assert utilisation(1e6, 156e6, gpu) == pytest.approx(0.5)
    assert utilisation(1e6, 156e6, gpu, processes=2) == pytest.approx(0.25)


def test_the_time_left_counts_steps_and_evaluations() -> None:
    clock = StepClock(CPU)
    for start in range(40):
        step = float(start)
        clock.add((step, step + 0.5, step + 1.0, step + 1.5, step + 2.0))  # 2 seconds each
    clock.evaluation_seconds = 15.0  # of 5 evaluations: at 0, 10, 20, 30 and 40
    assert seconds_left(clock, 2.0, 40, 100, 10) == 60 * 2 + 6 * 3
    assert seconds_left(clock, 2.0, 45, 105, 10) == 60 * 2 + 7 * 3  # at 50, 60, ..., 100 and 105
    steps = {"data": 20, "model": 20, "optimizer": 20}
    assert clock.totals() == {**steps, "evaluation": 15, "checkpoint": 0}
    assert clock.seconds == 80


def test_the_time_that_elapsed_is_that_of_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("steepest.train.timing.time.perf_counter", lambda: now)
    first = StepClock(CPU)
    now += 5
    saved = first.state_dict()
    now += 1000  # until the run is continued
    second = StepClock(CPU)
    now += 2
    second.load_state_dict(saved)
    now += 1
    assert second.elapsed_seconds == 5 + 2 + 1


def test_the_pace_has_what_is_around_steps_but_no_first_one_and_no_evaluation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0
    monkeypatch.setattr("steepest.train.timing.time.perf_counter", lambda: now)
    clock = StepClock(CPU)
    pace = Pace(clock)
    now += 60  # compiles
    assert pace.step_seconds(8) == 0
    pace.after(8)
    assert pace.step_seconds(8) == 0
    for step in range(9, 13):
        now += 3
        pace.after(step)
    with clock.evaluating():
        now += 50
    assert pace.step_seconds(12) == 3


def test_no_speed_is_told_before_a_second_step_of_a_process(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first step of a process is slow, whether the run has had others before or not."""
    monkeypatch.setattr("steepest.train.loop.PROGRESS_SECONDS", 0)
    config, runtime = make_config(steps=8), Runtime(threads=1, checkpoint_every=3)
    told: list[Progress] = []

    class Killed(Exception):
        pass

    def killing(progress: Progress) -> None:
        told.append(progress)
        if progress.step == 5:
            raise Killed

    with pytest.raises(Killed):
        run(config, tmp_path, runtime=runtime, on_progress=killing)
    run(config, tmp_path, runtime=runtime, on_progress=told.append)
    trained = [p for p in told if p.phase == "training"]
    assert [p.step for p in trained] == [1, 2, 3, 4, 5, 4, 5, 6, 7, 8]
    for place, progress in enumerate(trained):
        first = place in (0, 5)
        assert (progress.tokens_per_second == 0) == (progress.seconds_left is None) == first


def test_the_time_left_has_what_is_around_steps(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("steepest.train.loop.PROGRESS_SECONDS", 0)
    monkeypatch.setattr(Pace, "step_seconds", lambda *_: 100.0)
    told: list[Progress] = []
    run(make_config(steps=6, every=6), tmp_path, runtime=PLAIN, on_progress=told.append)
    left = [p.seconds_left for p in told if p.phase == "training"]
    assert left[0] is None
    assert left[1:] == pytest.approx([400, 300, 200, 100, 0], abs=50)  # an evaluation beside
