"""The training loop.

A run is a pure function of its config: initial weights and batches come from the seed and the step
number; what else an optimizer may draw comes from torch's own generators, which are seeded for the
run, saved in its checkpoints, and given back to the caller as they were.
"""

from __future__ import annotations

import datetime
import math
import time
from collections.abc import Callable
from typing import Any

import torch

from steepest import data, models
from steepest.errors import UserError
from steepest.train import checkpoints, evaluation, memory, optimizers, peaks, records
from steepest.train.averaging import Averages
from steepest.train.config import RunConfig, Runtime
from steepest.train.divergence import LEAST_WINDOW, Divergence, DivergenceMonitor, of_validation
from steepest.train.feeding import Feed
from steepest.train.folder import RunFolder
from steepest.train.learner import Learner
from steepest.train.parallel import Parallel, whole
from steepest.train.precision import stored_bytes
from steepest.train.progress import PROGRESS_SECONDS, Progress, seconds_left
from steepest.train.sinks import Sinks
from steepest.train.spikes import SpikeCounter
from steepest.train.step_taken import StepTaken
from steepest.train.stopping import Preempted, StopRequest
from steepest.train.timing import StepClock
from steepest.train.watching import Watch

SCHEMA = 1
"""Of result.json."""


class Training:
    """One process's work on a run, from its last checkpoint to its end."""

    def __init__(
        self,
        config: RunConfig,
        tokens: data.TokenData,
        folder: RunFolder,
        *,
        device: torch.device,
        runtime: Runtime,
        parallel: Parallel,
        on_progress: Callable[[Progress], None] | None,
    ) -> None:
        self.config, self.tokens, self.folder, self.device = config, tokens, folder, device
        self.runtime, self.parallel = runtime, parallel
        self.first = parallel.rank == 0
        self.on_progress = on_progress if self.first else None
        self.step, self.rows, self.expected_steps = 0, 0, config.training.steps
        self.loss: float | None = None
        self.initial_val_loss: float | None = None
        self.val_loss: float | None = None
        self.averaged: dict[str, float] = {}
        self.diverged: Divergence | None = None
        self.done: list[StepTaken] = []
        loader = data.Loader(
            tokens.train,
            batch_size=config.data.batch_size,
            sequence_length=config.data.sequence_length,
            seed=config.training.seed,
            packing=config.data.as_packing(),
        )
        self.clock = StepClock(device)
        self.monitor = DivergenceMonitor(
            config.training.steps,
            config.schedule.warmup_steps,
            patience=LEAST_WINDOW if config.training.nonfinite == "skip" else 0,
        )
        self.flops_per_token = models.training_flops_per_token(
            config.model, config.data.sequence_length
        )
        self.spikes = SpikeCounter()
        self.reported = -math.inf
        self.report("preparing")

        started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self.learner = Learner(config, device, self.parallel)
        self.averages = Averages(config.averaging, self.learner.model)
        self.warnings = self.learner.warnings + self.resume()
        self.feed = Feed(loader, self.learner.batch, parallel, device)
        if self.first:
            self.warnings = records.record_session(
                folder.environment, records.environment(device), started, self.step, self.warnings
            )
            records.truncate_metrics(folder.metrics, self.step if self.step else -1)
            self.metrics = records.MetricsWriter(folder.metrics)
        self.watch = Watch(
            self.learner, runtime, folder.dynamics if self.first else None, self.step
        )
        self.sinks = Sinks(
            runtime.sinks if self.first else (),
            folder.path,
            run=config.hash(),
            config=config.to_dict(),
            step=self.step,
        )

    def finish(self, stop: StopRequest) -> dict[str, Any]:
        """Train to the last step or to divergence; write and return the result."""
        evaluation, runtime = self.config.evaluation, self.runtime
        if self.step == 0:
            self.evaluate()
        while not self.learner.batch.finished and self.diverged is None:
            self.train_step()
            last = self.learner.batch.finished
            evaluates = last or self.step % evaluation.every == 0 or self.step in evaluation.at
            saves = runtime.checkpoint_every > 0 and (
                last or self.step % runtime.checkpoint_every == 0
            )
            logs = self.step % runtime.log_every == 0 or self.device.type == "cpu"
            if evaluates or saves or logs:
                self.settle()
            if evaluates and self.diverged is None:
                self.evaluate()
            stops = logs and not last and self.parallel.any(stop.asked)
            if (saves or stops) and self.diverged is None:
                self.settle()
                self.save(last)
            if stops:
                raise Preempted(self.step)
            self.report("training")
        result = self.result()
        if self.first:
            self.metrics.close()
            self.watch.close()
            self.folder.write_result(result)
        self.report("done", always=True)
        return result

    def train_step(self) -> None:
        """Take one optimizer step; `settle` takes in its numbers."""
        self.watch.before(self.step + 1, logged=self.logs_next())
        start = self.clock.mark()
        size, batch = self.learner.batch.size, self.feed.next()
        loaded = self.clock.mark()
        lrs = optimizers.learning_rates(self.learner.optimizer, self.learner.roles)
        gradient, optimizer_marks = self.learner.step(batch, self.clock)
        self.step, self.rows = self.step + 1, self.learner.batch.rows
        self.expected_steps = self.learner.batch.expected_steps
        self.averages.update(self.step)
        marks = (start, loaded, *optimizer_marks, self.clock.mark())
        moved = self.watch.after(self.step)
        self.done.append(StepTaken(self.step, gradient, lrs, size, self.rows, marks, moved))

    def logs_next(self) -> bool:
        """Return whether the coming step gets a record: every so many, the first and the last."""
        step, batch = self.step + 1, self.learner.batch
        last = batch.rows + batch.size >= batch.budget
        return step % self.runtime.log_every == 0 or step == 1 or last

    def settle(self) -> None:
        """Take in the numbers of the steps done: times, divergence, records.

        On a GPU this waits for them, so it is not called every step there.
        """
        for done in self.done:
            self.clock.add(done.marks)
            self.loss = done.gradient.loss.item()
            self.spikes.update(self.loss)
            self.diverged = self.monitor.update(done.step, self.loss)
            if done.moved:
                self.record_step(done)
            if self.diverged is not None:
                self.rows = done.rows
                break
        self.done.clear()

    def record_step(self, done: StepTaken) -> None:
        """Record the numbers of a training step, unless its loss is not one."""
        numbers = done.numbers(self.config.training.clip_norm)
        if numbers["loss"] is None:
            return
        self.record(
            "train",
            done.step,
            tokens=done.rows * self.config.data.sequence_length,
            **numbers,
            bits_per_byte=self.train_bits(numbers["loss"]),
            loss_spikes=self.spikes.count,
            skipped_steps=optimizers.skipped_steps(self.learner.optimizer),
            **({"mfu": self.mfu} if self.mfu is not None else {}),
            **({"memory_bytes": self.memory()} if done.step == 1 else {}),
        )

    def train_bits(self, nats: float) -> float:
        """Return a loss of training tokens in bits per byte."""
        return evaluation.Score(nats, self.tokens.train.bytes_per_token).bits_per_byte

    def val_bits(self, nats: float) -> float:
        """Return a loss of held-out tokens in bits per byte."""
        return evaluation.Score(nats, self.tokens.validation.bytes_per_token).bits_per_byte

    def averaged_bits(self) -> dict[str, float]:
        """Return the held-out losses of averaged weights in bits per byte."""
        return {name: self.val_bits(nats) for name, nats in self.averaged.items()}

    def memory(self) -> dict[str, int]:
        """Return this process's bytes by category."""
        return memory.by_category(self.learner, self.averages)

    def evaluate(self) -> None:
        """Measure and record the held-out loss."""
        self.report("evaluating")
        config, learner = self.config, self.learner
        numbers: dict[str, float] = {}
        with evaluation.evaluation_weights(learner.model, learner.optimizer):
            score = self.score(self.tokens.validation, config.evaluation.tokens)
            if config.evaluation.train_tokens:
                train = self.score(self.tokens.train, config.evaluation.train_tokens)
                numbers |= {"train_loss": train.nats, "train_bits_per_byte": train.bits_per_byte}
        self.diverged = of_validation(self.step, score.nats)
        if self.diverged is not None:
            return
        self.val_loss = score.nats
        if self.step == 0:
            self.initial_val_loss = score.nats
        self.averaged = {}
        for name in self.averages.names():
            with self.averages.weights(name):
                held_out = self.score(self.tokens.validation, config.evaluation.tokens)
            self.averaged[name] = held_out.nats
        self.record(
            "eval",
            self.step,
            val_loss=score.nats,
            val_bits_per_byte=score.bits_per_byte,
            averaged=self.averaged,
            averaged_bits_per_byte=self.averaged_bits(),
            **numbers,
        )

    def score(self, split: data.TokenSplit, tokens: int) -> evaluation.Score:
        """Return the loss over tokens of a split with the weights that are in place."""
        with self.clock.evaluating():
            return evaluation.evaluate(
                self.learner.model,
                split,
                self.config,
                self.device,
                tokens=tokens,
                parallel=self.parallel,
            )

    @property
    def seen_tokens(self) -> int:
        """Training tokens so far."""
        return self.rows * self.config.data.sequence_length

    @property
    def tokens_per_second(self) -> float:
        """Tokens of an average step over the median time of one; 0 before the first."""
        duration = self.clock.step_seconds
        return self.seen_tokens / self.step / duration if duration else 0.0

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilisation; None where the device's peak is not known."""
        processes = self.parallel.world_size
        return peaks.utilisation(
            self.tokens_per_second, self.flops_per_token, self.device, processes
        )

    def record(self, kind: str, step: int, **numbers: Any) -> None:
        """Append a line to metrics.jsonl."""
        if not self.first:
            return
        place = {"kind": kind, "step": step, "tokens": self.seen_tokens}
        times = {name: round(seconds, 6) for name, seconds in self.clock.totals().items()}
        seconds = {"seconds": round(self.clock.seconds, 6), "part_seconds": times}
        record = {**place, **numbers, **seconds}
        self.metrics.write(record)
        self.sinks.write(record)

    def save(self, last: bool) -> None:
        """Write a checkpoint; the last one also has the weights to evaluate, if those differ."""
        if self.first:  # a checkpoint must not know of records that a power cut can take
            self.metrics.sync()
            self.watch.sync()
        learner = self.learner
        state = {
            "schema": checkpoints.SCHEMA,
            "hash": self.config.hash(),
            "step": self.step,
            "loss": self.loss,
            "initial_val_loss": self.initial_val_loss,
            "val_loss": self.val_loss,
            "averaged": self.averaged,
            "monitor": self.monitor.state_dict(),
            "spikes": self.spikes.state_dict(),
            "clock": self.clock.state_dict(),
            "learner": learner.state_dict(),
            "averages": self.averages.state_dict(),
        }
        if last and evaluation.has_modes(learner.optimizer):
            with evaluation.evaluation_weights(learner.model, learner.optimizer):
                weights = learner.model.state_dict()
                state["evaluation_model"] = {key: whole(w).clone() for key, w in weights.items()}
        if self.first:
            runtime = self.runtime
            keep = 1 if last else runtime.keep_checkpoints
            checkpoints.save(
                self.folder.checkpoints, self.step, state, keep, runtime.permanent_every
            )

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
            self.averaged = state["averaged"]
            self.monitor.load_state_dict(state["monitor"])
            self.spikes.load_state_dict(state["spikes"])
            self.clock.load_state_dict(state["clock"])
            self.learner.load_state_dict(state["learner"])
            self.rows = self.learner.batch.rows
            self.averages.load_state_dict(state["averages"])
        return warnings

    def result(self) -> dict[str, Any]:
        """Return the content of result.json."""
        config, parameters = self.config, self.learner.parameters
        finished = self.diverged is None
        steps = self.step if self.diverged is None else self.diverged.step
        val_loss = self.val_loss if finished else None
        return {
            "schema": SCHEMA,
            "hash": config.hash(),
            "status": "finished" if finished else "diverged",
            "optimizer": config.optimizer.name,
            "lr": config.optimizer.lr,
            "seed": config.training.seed,
            "steps": steps,
            "tokens": self.seen_tokens,
            "initial_val_loss": self.initial_val_loss,
            "val_loss": val_loss,
            "averaged": self.averaged if finished else {},
            "averaged_bits_per_byte": self.averaged_bits() if finished else {},
            "val_bits_per_byte": None if val_loss is None else self.val_bits(val_loss),
            "parameters": sum(p.numel() for p in parameters),
            "parameter_bytes": sum(map(stored_bytes, parameters)),
            "state_bytes": optimizers.state_bytes(self.learner.optimizer),
            "step_ms": 1000 * self.clock.step_seconds,
            **{f"{name}_ms": 1000 * s for name, s in self.clock.part_seconds().items()},
            "tokens_per_second": self.tokens_per_second,
            "flops_per_token": self.flops_per_token,
            "mfu": self.mfu,
            "memory_bytes": self.memory(),
            "seconds": self.clock.seconds,
            "part_seconds": self.clock.totals(),
            "loss_spikes": self.spikes.count,
            "skipped_steps": optimizers.skipped_steps(self.learner.optimizer),
            "diverged_at_step": None if self.diverged is None else self.diverged.step,
            "reason": None if self.diverged is None else self.diverged.reason,
            "warnings": [*self.warnings, *self.sinks.warnings],
            "config": config.to_dict(),
        }

    def report(self, phase: str, *, always: bool = False) -> None:
        """Tell `on_progress`, unless it was told a moment ago."""
        now = time.monotonic()
        if self.on_progress is None or (now - self.reported < PROGRESS_SECONDS and not always):
            return
        self.reported = now
        self.on_progress(
            Progress(
                step=self.step,
                steps=self.expected_steps,
                tokens=self.seen_tokens,
                loss=self.loss,
                tokens_per_second=self.tokens_per_second,
                phase=phase,
                mfu=self.mfu,
                seconds_left=seconds_left(
                    self.clock, self.step, self.expected_steps, self.config.evaluation.every
                ),
            )
        )
