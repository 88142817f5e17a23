"""The training loop.

A run is a pure function of its config: initial weights and batches come from the seed and the step
number; what else an optimizer may draw comes from torch's own generators, which are seeded for the
run, saved in its checkpoints, and given back to the caller as they were.
"""

from __future__ import annotations

import datetime
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from steepest import data
from steepest.errors import UserError
from steepest.train import checkpoints, evaluation, optimizers, records
from steepest.train.config import RunConfig, Runtime
from steepest.train.divergence import Divergence, DivergenceMonitor, of_validation
from steepest.train.folder import RunFolder, locate, opened
from steepest.train.learner import Learner
from steepest.train.resolving import is_resolved, resolve
from steepest.train.schedules import multiplier
from steepest.train.timing import Mark, StepClock

SCHEMA = 1
PROGRESS_SECONDS = 0.25
"""Least time between two calls of `on_progress`."""


@dataclass(frozen=True)
class Progress:
    """How far a run is, for somebody who watches it."""

    step: int
    steps: int
    tokens: int
    loss: float | None
    """The last training loss; None before the first step."""
    tokens_per_second: float
    phase: str
    """preparing, training, evaluating or done."""


def run(
    config: RunConfig,
    runs_dir: Path,
    *,
    runtime: Runtime | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> dict[str, Any]:
    """Train as `config` says in `runs_dir/<hash>`, and return the content of its result.json.

    A complete run is returned at once; one that was killed continues from its last checkpoint and
    ends with the same bits as one that was not. A run that diverges ends early, with status
    "diverged". `on_progress` is called at most every quarter of a second, and at the end.

    Raises UserError for input that cannot work, and if another process works on the run.
    """
    runtime = runtime or Runtime()
    if is_resolved(config) and (result := locate(runs_dir, config).read_result()) is not None:
        return result
    device = _device(runtime.device)
    tokens = data.prepare(config.data.corpus, config.data.vocab_size)
    optimizers.check(config.optimizer, config.model)
    config = resolve(config, tokens)
    with opened(runs_dir, config) as folder:
        if (result := folder.read_result()) is not None:
            return result
        with _own_torch_state(config.training.seed, device, runtime.threads):
            training = _Training(
                config, tokens, folder, device=device, runtime=runtime, on_progress=on_progress
            )
            return training.finish()


@dataclass(frozen=True)
class _Done:
    """A step taken, whose numbers may still be in the making on a GPU."""

    step: int
    loss: torch.Tensor
    grad_norm: torch.Tensor
    marks: tuple[Mark, Mark, Mark, Mark]


class _Training:
    """One process's work on a run, from its last checkpoint to its end."""

    def __init__(
        self,
        config: RunConfig,
        tokens: data.TokenData,
        folder: RunFolder,
        *,
        device: torch.device,
        runtime: Runtime,
        on_progress: Callable[[Progress], None] | None,
    ) -> None:
        self.config, self.tokens, self.folder, self.device = config, tokens, folder, device
        self.runtime, self.on_progress = runtime, on_progress
        self.step = 0
        self.loss: float | None = None
        self.initial_val_loss: float | None = None
        self.val_loss: float | None = None
        self.diverged: Divergence | None = None
        self.done: list[_Done] = []
        self.clock = StepClock(device)
        self.monitor = DivergenceMonitor(config.training.steps, config.schedule.warmup_steps)
        self.reported = -math.inf
        self.report("preparing")

        started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self.learner = Learner(config, device)
        warnings = self.learner.warnings + self.resume()
        self.warnings = records.record_session(
            folder.environment, records.environment(device), started, self.step, warnings
        )
        records.truncate_metrics(folder.metrics, self.step if self.step else -1)
        self.metrics = records.MetricsWriter(folder.metrics)

    def finish(self) -> dict[str, Any]:
        """Train to the last step or to divergence; write and return the result."""
        training, runtime = self.config.training, self.runtime
        if self.step == 0:
            self.evaluate()
        while self.step < training.steps and self.diverged is None:
            self.train_step()
            last = self.step == training.steps
            evaluates = last or self.step % training.eval_every == 0
            saves = runtime.checkpoint_every > 0 and (
                last or self.step % runtime.checkpoint_every == 0
            )
            logs = self.step % runtime.log_every == 0 or self.device.type == "cpu"
            if evaluates or saves or logs:
                self.settle()
            if evaluates and self.diverged is None:
                self.evaluate()
            if saves and self.diverged is None:
                self.save(last)
            self.report("training")
        self.metrics.close()
        result = self.result()
        self.folder.write_result(result)
        self.report("done", always=True)
        return result

    def train_step(self) -> None:
        """Take one optimizer step; `settle` takes in its numbers."""
        start = self.clock.mark()
        batch = data.batch(
            self.tokens.train,
            seed=self.config.training.seed,
            step=self.step,
            batch_size=self.config.data.batch_size,
            sequence_length=self.config.data.sequence_length,
        )
        inputs, targets = (self.to_device(tokens) for tokens in batch)
        loss, grad_norm, optimizer_marks = self.learner.step(inputs, targets, self.clock)
        self.step += 1
        marks = (start, *optimizer_marks, self.clock.mark())
        self.done.append(_Done(self.step, loss, grad_norm, marks))

    def to_device(self, tokens: torch.Tensor) -> torch.Tensor:
        """Copy tokens to the device without waiting for a GPU."""
        if self.device.type == "cuda":
            return tokens.pin_memory().to(self.device, non_blocking=True)
        return tokens

    def settle(self) -> None:
        """Take in the numbers of the steps done: times, divergence, records.

        On a GPU this waits for them, so it is not called every step there.
        """
        steps, log_every = self.config.training.steps, self.runtime.log_every
        for done in self.done:
            self.clock.add(*done.marks)
            self.loss = done.loss.item()
            self.diverged = self.monitor.update(done.step, self.loss)
            logs = done.step % log_every == 0 or done.step in (1, steps)
            if logs and math.isfinite(self.loss):
                norm = done.grad_norm.item()
                factor = multiplier(done.step - 1, steps, self.config.schedule)
                self.record(
                    "train",
                    done.step,
                    loss=self.loss,
                    lr=self.config.optimizer.lr * factor,
                    grad_norm=norm if math.isfinite(norm) else None,
                )
            if self.diverged is not None:
                break
        self.done.clear()

    def evaluate(self) -> None:
        """Measure and record the held-out loss."""
        self.report("evaluating")
        with evaluation.evaluation_weights(self.learner.model, self.learner.optimizer):
            loss = evaluation.evaluate(
                self.learner.model, self.tokens.validation, self.config, self.device
            )
        self.diverged = of_validation(self.step, loss)
        if self.diverged is not None:
            return
        self.val_loss = loss
        if self.step == 0:
            self.initial_val_loss = loss
        self.record("eval", self.step, val_loss=loss)

    def record(self, kind: str, step: int, **numbers: float | None) -> None:
        """Append a line to metrics.jsonl."""
        place = {"kind": kind, "step": step, "tokens": step * self.config.tokens_per_step}
        self.metrics.write({**place, **numbers, "seconds": round(self.clock.seconds, 6)})

    def save(self, last: bool) -> None:
        """Write a checkpoint; the last one also has the weights to evaluate, if those differ."""
        self.metrics.sync()  # a checkpoint must not know of records that a power cut can take
        learner = self.learner
        state = {
            "schema": SCHEMA,
            "hash": self.config.hash(),
            "step": self.step,
            "loss": self.loss,
            "initial_val_loss": self.initial_val_loss,
            "val_loss": self.val_loss,
            "monitor": self.monitor.state_dict(),
            "clock": self.clock.state_dict(),
            "learner": learner.state_dict(),
        }
        if last and evaluation.has_modes(learner.optimizer):
            with evaluation.evaluation_weights(learner.model, learner.optimizer):
                weights = learner.model.state_dict()
                state["evaluation_model"] = {key: w.clone() for key, w in weights.items()}
        keep = 1 if last else checkpoints.KEEP
        checkpoints.save(self.folder.checkpoints, self.step, state, keep)

    def resume(self) -> list[str]:
        """Continue from the newest readable checkpoint; return a sentence per unreadable one."""
        state, warnings = checkpoints.load_newest(self.folder.checkpoints)
        if state is not None:
            if state["hash"] != self.config.hash():
                raise UserError(
                    f"The checkpoint of step {state['step']} in {self.folder.checkpoints} is of "
                    f"run {state['hash']}, not {self.config.hash()}; remove it."
                )
            self.step, self.loss = state["step"], state["loss"]
            self.initial_val_loss, self.val_loss = state["initial_val_loss"], state["val_loss"]
            self.monitor.load_state_dict(state["monitor"])
            self.clock.load_state_dict(state["clock"])
            self.learner.load_state_dict(state["learner"])
        return warnings

    def result(self) -> dict[str, Any]:
        """Return the content of result.json."""
        config, parameters = self.config, self.learner.parameters
        finished = self.diverged is None
        steps = self.step if self.diverged is None else self.diverged.step
        val_loss = self.val_loss if finished else None
        duration = self.clock.step_seconds
        return {
            "schema": SCHEMA,
            "hash": config.hash(),
            "status": "finished" if finished else "diverged",
            "optimizer": config.optimizer.name,
            "lr": config.optimizer.lr,
            "seed": config.training.seed,
            "steps": steps,
            "tokens": steps * config.tokens_per_step,
            "initial_val_loss": self.initial_val_loss,
            "val_loss": val_loss,
            "val_bits_per_byte": None
            if val_loss is None
            else val_loss / math.log(2) / self.tokens.validation_bytes_per_token,
            "parameters": sum(p.numel() for p in parameters),
            "parameter_bytes": sum(p.numel() * p.element_size() for p in parameters),
            "state_bytes": optimizers.state_bytes(self.learner.optimizer),
            "step_ms": 1000 * duration,
            "optimizer_ms": 1000 * self.clock.optimizer_seconds,
            "tokens_per_second": config.tokens_per_step / duration if duration else 0.0,
            "seconds": self.clock.seconds,
            "diverged_at_step": None if self.diverged is None else self.diverged.step,
            "reason": None if self.diverged is None else self.diverged.reason,
            "warnings": self.warnings,
            "config": config.to_dict(),
        }

    def report(self, phase: str, *, always: bool = False) -> None:
        """Tell `on_progress`, unless it was told a moment ago."""
        now = time.monotonic()
        if self.on_progress is None or (now - self.reported < PROGRESS_SECONDS and not always):
            return
        self.reported = now
        tokens, duration = self.config.tokens_per_step, self.clock.step_seconds
        self.on_progress(
            Progress(
                step=self.step,
                steps=self.config.training.steps,
                tokens=self.step * tokens,
                loss=self.loss,
                tokens_per_second=tokens / duration if duration else 0.0,
                phase=phase,
            )
        )


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"Unknown device {name!r}; use cpu, cuda or cuda:N.") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"The device {name!r} was asked for, but torch finds no CUDA device.")
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"The device {name!r} is not supported; use cpu, cuda or cuda:N.")
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


@contextmanager
def _own_torch_state(seed: int, device: torch.device, threads: int | None) -> Iterator[None]:
    """Give the run torch's generators, seeded, and its number of threads; undo both after it."""
    threads_before = torch.get_num_threads()
    gpus = [device.index] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=gpus):
        torch.manual_seed(seed)
        torch.set_num_threads(threads or threads_before)
        try:
            yield
        finally:
            torch.set_num_threads(threads_before)
