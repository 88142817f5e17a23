"""The model with its optimizer and learning-rate schedule, and what one step does to them."""

from __future__ import annotations

import inspect
from typing import Any

import torch

import steepest
from steepest import models
from steepest.train import checkpoints, evaluation, optimizers
from steepest.train.compiling import loss_function
from steepest.train.config import RunConfig
from steepest.train.schedules import multiplier
from steepest.train.timing import Mark, StepClock


class Learner:
    """All that learns in a run: model, optimizer, schedule.

    `warnings` holds a sentence for everything that was asked and could not be done.
    """

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        self.model = models.build(config.model, torch.Generator().manual_seed(config.training.seed))
        self.model.to(device).train()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = optimizers.build(config.optimizer, self.model, config.training.seed)
        if evaluation.has_modes(self.optimizer):
            self.optimizer.train()  # type: ignore[attr-defined]
        self._takes_closure = _requires_closure(self.optimizer)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._multiplier)
        self._loss, self.warnings = loss_function(self.model, config, device)

    def _multiplier(self, step: int) -> float:
        steps = self.config.training.steps
        return multiplier(min(step, steps - 1), steps, self.config.schedule)

    def step(
        self, inputs: torch.Tensor, targets: torch.Tensor, clock: StepClock
    ) -> tuple[torch.Tensor, torch.Tensor, tuple[Mark, Mark]]:
        """Do one optimizer step on a batch, int64 [batch, time].

        Returns the loss before the step and the gradient's norm before clipping, both 0-d tensors
        that may still be in the making on a GPU, and when the optimizer began and ended. An
        optimizer that asks for a closure, as L-BFGS does, computes gradients in its own time.
        """
        if self._takes_closure:
            seen: list[tuple[torch.Tensor, torch.Tensor]] = []

            def closure() -> float:
                seen.append(self.gradient(inputs, targets))
                return seen[-1][0].item()

            begin = clock.mark()
            self.optimizer.step(closure)
            loss, norm = seen[0]
        else:
            self._observe(inputs, targets)
            loss, norm = self.gradient(inputs, targets)
            begin = clock.mark()
            self.optimizer.step()
        end = clock.mark()
        self.schedule.step()
        return loss, norm, (begin, end)

    def _observe(self, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        """Give the optimizer the extra gradient that it declares to want before this step."""
        if not isinstance(self.optimizer, steepest.Optimizer) or not (
            wanted := self.optimizer.wants()
        ):
            return
        if "previous_weights" in wanted:
            with self.optimizer.previous_weights():
                self.gradient(inputs, targets)
        else:
            self.gradient(inputs, self._sampled_labels(inputs), clip=False)
        self.optimizer.observe(batch_tokens=targets.numel())

    @torch.no_grad()
    def _sampled_labels(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return labels drawn from the model's predictions, int64 of the shape of `inputs`.

        The draw depends on the run's seed and the step alone.
        """
        seed = (0x5EED + (self.config.training.seed << 32) + self.schedule.last_epoch) % (1 << 63)
        generator = torch.Generator(self.device).manual_seed(seed)
        drawn = []
        for part in inputs.chunk(self.config.training.gradient_accumulation):
            with evaluation.autocast(self.config.training.precision, self.device):
                odds = self.model(part).float().softmax(-1).flatten(0, 1)
            drawn.append(torch.multinomial(odds, 1, generator=generator).view_as(part))
        return torch.cat(drawn)

    def gradient(
        self, inputs: torch.Tensor, targets: torch.Tensor, *, clip: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Put the gradient of the batch's mean loss into the parameters, clipped if `clip`.

        Returns the loss and the norm before clipping, without waiting for a GPU.
        """
        training = self.config.training
        parts = training.gradient_accumulation
        self.optimizer.zero_grad(set_to_none=True)
        losses = []
        for part in zip(inputs.chunk(parts), targets.chunk(parts), strict=True):
            with evaluation.autocast(training.precision, self.device):
                loss = self._loss(*part) / parts
            loss.backward()  # type: ignore[no-untyped-call]
            losses.append(loss.detach())
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if clip and training.clip_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, training.clip_norm, norm)
        return torch.stack(losses).sum(), norm

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs to continue to the bit."""
        rng = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "rng": rng,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        self.model.load_state_dict(state["model"])
        checkpoints.load_optimizer(self.optimizer, state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        torch.set_rng_state(state["rng"]["cpu"])
        if self.device.type == "cuda" and "cuda" in state["rng"]:
            torch.cuda.set_rng_state(state["rng"]["cuda"], self.device)


def _requires_closure(optimizer: torch.optim.Optimizer) -> bool:
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    return closure is not None and closure.default is closure.empty
