"""A made-up race on disk, with the shape of real ones."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w

STEPS = 600
TOKENS_PER_STEP = 2048
EVAL_EVERY = 60
PARAMETERS = 412_736


@dataclass(frozen=True)
class Racer:
    """An optimizer of the fake race: its loss at its best lr, and what it costs."""

    name: str
    best_lr: float
    loss: float
    speed: float = 1.0
    step_ms: float = 24.0
    optimizer_ms: float = 1.0
    bytes_per_parameter: float = 8.0
    lrs: tuple[float, ...] = ()
    cliff: float = math.inf
    """Learning rates from here on diverge."""
    diverged_seeds: tuple[int, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def tried(self) -> tuple[float, ...]:
        return self.lrs or tuple(self.best_lr * f for f in (1 / 3, 1, 3))


RACERS = (
    Racer("adamw", 3e-3, 3.420, lrs=(1e-3, 3e-3, 1e-2, 3e-2), cliff=3e-2),
    Racer("lion", 1e-3, 3.452, 0.95, 23.4, 0.7, 4.0, lrs=(1e-4, 3e-4, 1e-3)),
    Racer("muon", 2e-2, 3.342, 1.25, 25.9, 2.9, 4.6, lrs=(7e-3, 2e-2, 6e-2, 0.2), cliff=0.2),
    Racer("soap", 3e-3, 3.338, 1.25, 33.1, 9.9, 17.2),
    Racer("schedulefree", 1e-2, 3.431, 0.98, 24.4, 1.3),
    Racer("sgd", 0.3, 3.915, 0.6, 22.6, 0.4, 4.0),
    Racer("mine.py:<Mine>", 1e-2, 3.401, 1.05, 25.2, 2.2, 8.0, diverged_seeds=(102,)),
)
PROTOCOL = {
    "model": "llama-tiny",
    "parameters": PARAMETERS,
    "corpus": "sotu",
    "vocab_size": 1024,
    "sequence_length": 128,
    "batch_size": 16,
    "steps": STEPS,
    "tokens": STEPS * TOKENS_PER_STEP,
    "schedule": "cosine",
    "warmup_steps": 20,
    "precision": "float32",
    "tuning": "grid, 3 to 4 learning rates",
}
ENVIRONMENT = {
    "steepest": "0.1.0",
    "git_commit": None,
    "python": "3.11.2",
    "torch": "2.13.0+cpu",
    "numpy": "2.4.6",
    "platform": "Linux-6.1-x86_64",
    "cpu": "Imaginary CPU @ 3 GHz",
    "threads": 2,
    "device": "cpu",
    "gpu": None,
    "sessions": [{"started": "2026-11-22T06:10:00+00:00", "step": 0, "warnings": []}],
}


def build(
    folder: Path,
    racers: Iterable[Racer] = RACERS,
    seeds: Iterable[int] = (101, 102, 103),
    baseline: str = "adamw",
) -> Path:
    """Write a race and all its runs to `folder`; return it."""
    racers = list(racers)
    tuning = {r.name: [write_run(folder, r, lr, 0) for lr in r.tried] for r in racers}
    final = {r.name: [write_run(folder, r, r.best_lr, seed) for seed in seeds] for r in racers}
    manifest = {
        "schema": 1,
        "created": "2026-11-22T06:30:00+00:00",
        "baseline": baseline,
        "optimizers": [r.name for r in racers],
        "protocol": PROTOCOL,
        "tuning": tuning,
        "final": final,
        "seconds": 731.4,
    }
    (folder / "race.json").write_text(json.dumps(manifest))
    return folder


def write_run(folder: Path, racer: Racer, lr: float, seed: int) -> str:
    """Write one run; return its hash."""
    identity = hashlib.sha256(f"{racer.name} {lr} {seed}".encode()).hexdigest()[:12]
    run = folder / "runs" / identity
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    config = {
        "optimizer": {"name": racer.name, "lr": lr, "options": racer.options},
        "training": {"steps": STEPS, "seed": seed},
    }
    diverged = lr >= racer.cliff or seed in racer.diverged_seeds
    lines, losses = _metrics(racer, lr, seed, last=STEPS // 4 if diverged else STEPS)
    result = _result(
        identity, racer, lr, seed=seed, last=lines[-1], loss=None if diverged else losses[-1]
    )
    (run / "config.toml").write_text(tomli_w.dumps(config))
    (run / "environment.json").write_text(json.dumps(ENVIRONMENT))
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "result.json").write_text(json.dumps({**result, "config": config}))
    return identity


def _metrics(
    racer: Racer, lr: float, seed: int, last: int
) -> tuple[list[dict[str, Any]], list[float]]:
    shared = np.random.default_rng(seed)  # what a seed does to every optimizer alike
    own = np.random.default_rng([seed, *racer.name.encode()])
    final = racer.loss + 0.05 * math.log(lr / racer.best_lr) ** 2
    final += 0.02 * shared.standard_normal() + 0.004 * own.standard_normal()
    lines: list[dict[str, Any]] = []
    losses = []
    for step in range(0, last + 1, 10):
        done = step / STEPS
        loss = final + (6.93 - final) * math.exp(-5.5 * racer.speed * done**0.6)
        loss -= (6.93 - final) * math.exp(-5.5 * racer.speed) * done
        place = {"step": step, "tokens": step * TOKENS_PER_STEP}
        seconds = round(step * racer.step_ms / 1000 * (1 + 0.01 * own.standard_normal()), 6)
        if step:
            train = {"loss": loss + 0.03 * own.standard_normal(), "lr": lr, "grad_norm": 0.7}
            lines.append({"kind": "train", **place, **train, "seconds": seconds})
        if step % EVAL_EVERY == 0:
            losses.append(loss)
            lines.append({"kind": "eval", **place, "val_loss": loss, "seconds": seconds})
    return lines, losses


def _result(
    identity: str, racer: Racer, lr: float, *, seed: int, last: dict[str, Any], loss: float | None
) -> dict[str, Any]:
    step = last["step"]
    return {
        "schema": 1,
        "hash": identity,
        "status": "finished" if loss is not None else "diverged",
        "optimizer": racer.name,
        "lr": lr,
        "seed": seed,
        "steps": step,
        "tokens": last["tokens"],
        "initial_val_loss": 6.93,
        "val_loss": loss,
        "val_bits_per_byte": None if loss is None else loss / math.log(2) / 3.05,
        "parameters": PARAMETERS,
        "parameter_bytes": 4 * PARAMETERS,
        "state_bytes": round(racer.bytes_per_parameter * PARAMETERS),
        "step_ms": racer.step_ms,
        "optimizer_ms": racer.optimizer_ms,
        "tokens_per_second": 1000 * TOKENS_PER_STEP / racer.step_ms,
        "seconds": last["seconds"],
        "diverged_at_step": None if loss is not None else step,
        "reason": None if loss is not None else f"The training loss was nan at step {step}.",
        "warnings": [],
    }
