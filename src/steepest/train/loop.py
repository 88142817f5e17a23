"""The training loop: which steps a run takes, and after which it evaluates, saves and stops.

A run is a pure function of its config: initial weights and batches come from the seed and the step
number; what else an optimizer may draw comes from torch's own generators, which are seeded for the
run, saved in its checkpoints, and given back to the caller as they were.
"""

from __future__ import annotations

import datetime
import logging
import time
from collections.abc import Callable
from typing import Any

import torch

from steepest import data
from steepest.errors import UserError
from steepest.train import checkpoints, evaluation, optimizers, records
from steepest.train.config import RunConfig, Runtime
from steepest.train.divergence import of_validation
from steepest.train.feeding import Feed
from steepest.train.folder import RunFolder
from steepest.train.journal import Journal
from steepest.train.parallel import Parallel
from steepest.train.progress import PROGRESS_SECONDS, Pace, Progress, progress_of
from steepest.train.result import result
from steepest.train.run_state import RunState
from steepest.train.step_taken import StepTaken
from steepest.train.stopping import Preempted, StopRequest
from steepest.train.watching import Watch

SETTLES_AT_ONCE = ("cpu",)
"""Kinds of devices where the numbers of a step are known when it has been taken."""


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
        self.config, self.folder, self.device = config, folder, device
        self.runtime, self.parallel = runtime, parallel
        self.first = parallel.rank == 0
        self.on_progress = on_progress if self.first else None
        self.reported = time.monotonic()
        self.done: list[StepTaken] = []
        loader = data.Loader(
            tokens.train,
            batch_size=config.data.batch_size,
            sequence_length=config.data.sequence_length,
            seed=config.training.seed,
            packing=config.data.as_packing(),
        )
        if self.on_progress is not None:
            self.on_progress(Progress(0, config.training.steps, 0, None, 0.0, "preparing"))
        started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self.state = RunState(config, tokens, device, parallel)
        self.learner = self.state.learner
        self.pace = Pace(self.state.clock)
        warnings = self.learner.warnings + self.resume()
        self.feed = Feed(loader, self.learner.batch, parallel, device)
        self.journal = Journal(self.state, tokens, folder, runtime, writes=self.first)
        self.watch = Watch(
            self.learner, runtime, folder.dynamics if self.first else None, self.step
        )
        warnings += self.journal.warnings + self.watch.warnings
        self.warnings = self.begin_session(started, warnings)

    @property
    def step(self) -> int:
        """Steps taken."""
        return self.state.step

    def begin_session(self, started: str, warnings: list[str]) -> list[str]:
        """Tell the warnings of this process's beginning; return those of all before it, too."""
        if not self.first:
            return warnings
        for warning in warnings:
            logging.getLogger("steepest").warning(warning)
        environment = records.environment(self.device)
        return records.record_session(
            self.folder.environment, environment, started, self.step, warnings
        )

    def finish(self, stop: StopRequest) -> dict[str, Any]:
        """Train to the last step or to divergence; write and return the result."""
        evaluation, runtime, state = self.config.evaluation, self.runtime, self.state
        if self.step == 0:
            self.evaluate()
        while not self.learner.batch.finished and state.diverged is None:
            self.train_step()
            last = self.learner.batch.finished
            evaluates = last or self.step % evaluation.every == 0 or self.step in evaluation.at
            saves = runtime.checkpoint_every > 0 and (
                last or self.step % runtime.checkpoint_every == 0
            )
            logs = self.step % runtime.log_every == 0 or self.device.type in SETTLES_AT_ONCE
            if evaluates or saves or logs:
                self.settle()
            if evaluates and state.diverged is None:
                self.evaluate()
            if stops := not last and self.parallel.any(stop.asked):
                self.settle()
            if (saves or stops) and state.diverged is None:
                with state.clock.saving():
                    self.save(last)
                if stops:
                    raise Preempted(self.step)
            self.pace.after(self.step)
            self.report("training")
        found = result(state, [*self.warnings, *self.journal.sinks.warnings])
        if self.first:
            if state.diverged is None and runtime.checkpoint_every:
                # A process that died at the end has left the one before.
                checkpoints.prune(self.folder.checkpoints, self.step, keep=1)
            self.folder.write_result(found)
        self.report("done", always=True)
        return found

    def train_step(self) -> None:
        """Take one optimizer step; `settle` takes in its numbers."""
        state, learner, clock = self.state, self.learner, self.state.clock
        self.watch.before(self.step + 1, logged=self.logs_next())
        start = clock.mark()
        size, batch = learner.batch.size, self.feed.next()
        loaded = clock.mark()
        lrs = optimizers.learning_rates(learner.optimizer, learner.roles)
        gradient, optimizer_marks = learner.step(batch, clock)
        state.step, state.rows = state.step + 1, learner.batch.rows
        state.averages.update(state.step)
        marks = (start, loaded, *optimizer_marks, clock.mark())
        skipped = optimizers.skipped_steps(learner.optimizer)
        moved = self.watch.after(state.step)
        self.done.append(
            StepTaken(state.step, gradient, lrs, size, state.rows, skipped, marks, moved)
        )

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
            self.state.settle(done)
            if done.moved:
                self.journal.write_step(done)
            if self.state.diverged is not None:
                break
        self.done.clear()

    def evaluate(self) -> None:
        """Measure and record the held-out loss."""
        self.report("evaluating")
        loss, numbers = self.state.held_out.measure()
        self.state.diverged = of_validation(self.step, loss)
        if self.state.diverged is None:
            self.journal.write("eval", self.step, **numbers, memory_bytes=self.state.memory)

    def save(self, last: bool) -> None:
        """Write a checkpoint; the last one also has the weights to evaluate, if those differ."""
        if self.first:  # a checkpoint must not know of records that a power cut can take
            self.journal.sync()
            self.watch.sync()
        learner, runtime = self.learner, self.runtime
        state = self.state.state_dict()
        if last and evaluation.has_modes(learner.optimizer):
            with evaluation.evaluation_weights(learner.model, learner.optimizer):
                state["evaluation_model"] = self.parallel.weights(learner.model)
        if self.first:
            keep = 1 if last else runtime.keep_checkpoints
            checkpoints.save(
                self.folder.checkpoints, self.step, state, keep, runtime.permanent_every
            )

    def resume(self) -> list[str]:
        """Continue from the newest readable checkpoint; return a sentence per unreadable one."""
        state, warnings = self.parallel.from_first(self.read_checkpoint)
        if state is not None:
            self.state.load_state_dict(state)
        return warnings

    def read_checkpoint(self) -> tuple[dict[str, Any] | None, list[str]]:
        """Return the newest readable checkpoint, None if there is none, and what was unreadable.

        Raises UserError if it is of another run.
        """
        state, warnings = checkpoints.load_newest(self.folder.checkpoints)
        if state is not None and state["hash"] != self.config.hash():
            raise UserError(
                f"The checkpoint of step {state['step']} in {self.folder.checkpoints} is of "
                f"run {state['hash']}, not {self.config.hash()}; remove it."
            )
        return state, warnings

    def report(self, phase: str, *, always: bool = False) -> None:
        """Tell how far the run is, unless that was told a moment ago."""
        now = time.monotonic()
        if self.on_progress is None or (now - self.reported < PROGRESS_SECONDS and not always):
            return
        self.reported = now
        self.on_progress(progress_of(self.state, phase, self.pace))
