"""A training step never waits for the device: the host reads no value of a tensor.

The first step, which makes the optimizer's state and kernels, is not held to this. What torch does
inside an operation is not seen on a CPU: its eigenvalues of matrices, which Shampoo and GaLore take
every so many steps, wait for a GPU.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import steepest
from steepest.data import Batch
from steepest.train import Runtime, run
from steepest.train.learner import Learner
from steepest.train.loop import Training
from steepest.train.timing import StepClock
from steepest.train.watching import Watch

from .conftest import MakeConfig

OPTIMIZERS = {
    "adamw": {},
    "muon": {},
    "soap": {"update_interval": 2},
    "prodigy": {},
}
READS = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "unique2")
"""What .item(), .tolist(), bool() and shapes that depend on values come down to."""


class NoReads(TorchDispatchMode):
    """Fails where the host reads a value of a tensor."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::").partition(".")[0]
        mask = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        if mask or name in READS:
            raise AssertionError(f"{func.name()} reads a tensor")
        return func(*args, **(kwargs or {}))


def learner_of(
    make_config: MakeConfig, name: str, device: torch.device, options: dict[str, Any] | None = None
) -> Learner:
    options = OPTIMIZERS[name] if options is None else options
    config = make_config(name=name, lr=1e-2, options=options, steps=8, gradient_accumulation=2)
    return Learner(config, device)


def batches(device: torch.device) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    pairs = [torch.randint(300, (2, 4, 16), generator=generator) for _ in range(6)]
    return [Batch(*pair.to(device)) for pair in pairs]


def test_the_mode_sees_reads() -> None:
    x = torch.ones(3)
    for read in (
        lambda: x.sum().item(), lambda: float(x[0]), lambda: bool(x[0] > 0), lambda: x[x > 0],
    ):  # fmt: skip
        with NoReads(), pytest.raises(AssertionError, match="reads a tensor"):
            read()


def take_steps(learner: Learner, count: int) -> None:
    """Take steps, and let none but the first read a tensor."""
    watch, clock = Watch(learner, Runtime(), None, 0), StepClock(learner.device)
    first, *rest = batches(learner.device)
    learner.step(first, clock)
    for step, batch in enumerate(rest[: count - 1], start=2):
        with NoReads():
            watch.before(step, logged=True)
            learner.step(batch, clock)
            watch.after(step)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_reads_no_tensor(name: str, make_config: MakeConfig) -> None:
    take_steps(learner_of(make_config, name, torch.device("cpu")), 6)


@pytest.mark.slow
@pytest.mark.parametrize("name", steepest.names())
def test_no_optimizer_s_step_reads_a_tensor(name: str, make_config: MakeConfig) -> None:
    """Nor do steps that do what comes every so many, but q_galore's, which asks what is due."""
    known = steepest.describe(name).hyperparameters
    every = [key for key in known if key.endswith("_interval")]
    often: dict[str, Any] = dict.fromkeys(every if name != "q_galore" else [], 2)
    options = often | ({"exact": True} if "exact" in known else {})
    take_steps(learner_of(make_config, name, torch.device("cpu"), options), 4)


def test_a_step_of_the_loop_reads_no_tensor(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Training.train_step

    def watched(self: Training) -> None:
        with NoReads() if self.step else nullcontext():
            whole(self)

    monkeypatch.setattr(Training, "train_step", watched)
    config = make_config(name="muon", steps=6, **{"averaging.ema": (0.9,), "averaging.every": 2})
    assert run(config, tmp_path, runtime=Runtime(threads=1, log_every=1))["status"] == "finished"


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_does_not_wait_for_a_gpu(name: str, make_config: MakeConfig) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    device = torch.device("cuda", 0)
    learner = learner_of(make_config, name, device)
    watch = Watch(learner, Runtime(), None, 0)
    clock = StepClock(device)
    first, *rest = batches(device)
    learner.step(first, clock)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step, batch in enumerate(rest, start=2):
            watch.before(step, logged=True)
            learner.step(batch, clock)
            watch.after(step)
    finally:
        torch.cuda.set_sync_debug_mode("default")
