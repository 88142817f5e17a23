"""Small runs that take milliseconds per step."""

from __future__ import annotations

import dataclasses
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from steepest.models import LlamaConfig
from steepest.train import (
    DataConfig,
    EvaluationConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    TrainingConfig,
)

MakeConfig = Callable[..., RunConfig]

MEASURED = ("elapsed_seconds", "seconds", "part_seconds", "memory_bytes", "mfu")
"""What records and results have that is another in each process: times and memory."""

MOMENTUM = '''
import torch


class Momentum(torch.optim.Optimizer):
    """SGD with momentum, noise from torch's global generator, and float64 state."""

    def __init__(self, params, lr=0.1, momentum=0.9, noise=0.0, weight_decay=0.0):
        super().__init__(
            params, dict(lr=lr, momentum=momentum, noise=noise, weight_decay=weight_decay)
        )

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["buffer"] = torch.zeros_like(p, dtype=torch.float64)
                state["buffer"].mul_(group["momentum"]).add_(p.grad.double())
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(group["lr"] * state["buffer"].float())
                p.add_(torch.randn(p.shape), alpha=group["noise"])
'''


@pytest.fixture(scope="session", autouse=True)
def _small_machine(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One thread, and no cache outside the test folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        torch.set_num_threads(1)
        yield


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a text file of made-up sentences, enough for a vocabulary of 300."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 7))) for _ in range(150)]
    weights = [1 / (rank + 1) for rank in range(len(words))]
    documents = [
        " ".join(rng.choices(words, weights, k=300)).capitalize() + ".\n" for _ in range(60)
    ]
    path = tmp_path_factory.mktemp("corpus") / "made_up.txt"
    path.write_text("\f".join(documents))
    return path


@pytest.fixture(scope="session")
def momentum_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file with an optimizer class `Momentum`."""
    path = tmp_path_factory.mktemp("optimizers") / "mine.py"
    path.write_text(MOMENTUM)
    return path


@pytest.fixture(scope="session")
def make_config(corpus: Path) -> MakeConfig:
    """Return a function that makes small configs; its keyword arguments replace fields by name.

    A name that several sections have is given with its section: **{"averaging.every": 5}.
    """
    base = RunConfig(
        model=LlamaConfig(vocab_size=300, hidden_size=16, layers=1, heads=2, intermediate_size=32),
        data=DataConfig(corpus=str(corpus), vocab_size=300, sequence_length=16, batch_size=4),
        optimizer=OptimizerConfig(name="torch.optim:AdamW", lr=1e-2),
        schedule=ScheduleConfig(warmup_steps=4),
        training=TrainingConfig(steps=30),
        evaluation=EvaluationConfig(every=10, tokens=512),
    )

    def make(**changes: Any) -> RunConfig:
        sections = {}
        for section in (field.name for field in dataclasses.fields(RunConfig)):
            part = getattr(base, section)
            fields = {field.name for field in dataclasses.fields(part)}
            fields -= {"schedule": {"name"}, "averaging": {"every"}}.get(section, set())
            chosen = {key: value for key, value in changes.items() if key in fields}
            own = {
                k.partition(".")[2]: v for k, v in changes.items() if k.startswith(section + ".")
            }
            chosen |= own
            sections[section] = dataclasses.replace(part, **chosen)
        return RunConfig(**sections)

    return make


@pytest.fixture
def child_environment() -> dict[str, str]:
    """Return the environment of a process that a test starts."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}
