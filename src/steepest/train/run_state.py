"""What a run has come to between two steps: all that a checkpoint holds and a result tells."""

from __future__ import annotations

from typing import Any

import torch

from steepest import models
from steepest.data import TokenData
from steepest.train import checkpoints, memory, optimizers, peaks
from steepest.train.averaging import Averages
from steepest.train.config import RunConfig
from steepest.train.divergence import LEAST_WINDOW, Divergence, DivergenceMonitor
from steepest.train.held_out import HeldOut
from steepest.train.learner import Learner
from steepest.train.parallel import Parallel
from steepest.train.spikes import SpikeCounter
from steepest.train.step_taken import StepTaken
from steepest.train.timing import StepClock


class RunState:
    """One process's model, optimizer and averages, where they are in the run, and how it went.

    On a GPU steps are taken before their numbers are known: `step` and `rows` are those of the
    steps taken; losses, spikes, skipped steps and times are of those that `settle` has seen.
    """

    def __init__(
        self, config: RunConfig, tokens: TokenData, device: torch.device, parallel: Parallel
    ) -> None:
        memory.forget_peak(device)
        self.clock = StepClock(device)
        self.config, self.device, self.parallel = config, device, parallel
        self.learner = Learner(config, device, parallel)
        self.averages = Averages(config.averaging, self.learner.model)
        self.held_out = HeldOut(config, tokens, self.learner, self.averages, self.clock)
        self.monitor = DivergenceMonitor(
            config.training.steps,
            config.schedule.warmup_steps,
            patience=LEAST_WINDOW if config.training.nonfinite == "skip" else 0,
        )
        self.spikes = SpikeCounter()
        self.step, self.rows, self.skipped = 0, 0, 0
        self.loss: float | None = None
        self.diverged: Divergence | None = None
        self.flops_per_token = models.training_flops_per_token(
            config.model, config.data.sequence_length
        )

    def settle(self, done: StepTaken) -> None:
        """Take in the time and the loss of a step; on a GPU this waits for it.

        A run that has diverged has come to that step and no further.
        """
        self.clock.add(done.marks)
        self.loss = done.gradient.loss.item()
        self.spikes.update(self.loss)
        self.skipped = done.skipped
        self.diverged = self.monitor.update(done.step, self.loss, done.gradient.norm.item())
        if self.diverged is not None:
            self.step, self.rows = done.step, done.rows

    @property
    def tokens(self) -> int:
        """Training tokens so far."""
        return self.rows * self.config.data.sequence_length

    @property
    def tokens_per_second(self) -> float:
        """Tokens of an average step over the median time of one; 0 before the first."""
        duration = self.clock.step_seconds
        return self.tokens / self.step / duration if duration else 0.0

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilisation; None where the device's peak is not known."""
        processes = self.parallel.world_size
        return peaks.utilisation(
            self.tokens_per_second, self.flops_per_token, self.device, processes
        )

    @property
    def memory(self) -> dict[str, int]:
        """This process's bytes by category."""
        return memory.by_category(self.learner, self.averages)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint holds; all processes must ask."""
        return {
            "schema": checkpoints.SCHEMA,
            "hash": self.config.hash(),
            "step": self.step,
            "loss": self.loss,
            **self.held_out.state_dict(),
            "monitor": self.monitor.state_dict(),
            "spikes": self.spikes.state_dict(),
            "clock": self.clock.state_dict(),
            "learner": self.learner.state_dict(),
            "averages": self.averages.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        self.step, self.loss = state["step"], state["loss"]
        self.held_out.load_state_dict(state)
        self.monitor.load_state_dict(state["monitor"])
        self.spikes.load_state_dict(state["spikes"])
        self.clock.load_state_dict(state["clock"])
        self.learner.load_state_dict(state["learner"])
        self.rows = self.learner.batch.rows
        self.skipped = optimizers.skipped_steps(self.learner.optimizer)
        self.averages.load_state_dict(state["averages"])
