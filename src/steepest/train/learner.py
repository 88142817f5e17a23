"""The model with its optimizer and schedules, and what one step does to them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import steepest
from steepest import models
from steepest.data import Batch
from steepest.models.cross_entropy import IGNORED
from steepest.train import evaluation, int8_weights, norm_test, optimizers, precision
from steepest.train.batch_size import BatchSize
from steepest.train.compiling import objective_function
from steepest.train.config import RunConfig
from steepest.train.parallel import Parallel, whole
from steepest.train.schedules import Schedules
from steepest.train.timing import Mark, StepClock


@dataclass(frozen=True)
class Gradient:
    """What a pass over a batch gave, beside the parameters' gradients; 0-d tensors.

    On a GPU they may still be in the making.
    """

    loss: Tensor
    """Cross-entropy in nats per token, over the batches of all processes."""
    norm: Tensor
    """Norm of the gradient before clipping."""
    statistics: dict[str, Tensor]
    """What else the model told, by name: means over the parts of this process's batch."""


class Learner:
    """All that learns in a run: model, optimizer, schedule.

    `warnings` holds a sentence for everything that was asked and could not be done.
    """

    def __init__(
        self, config: RunConfig, device: torch.device, parallel: Parallel | None = None
    ) -> None:
        self.config, self.device = config, device
        self.parallel = parallel or Parallel()
        generator = torch.Generator().manual_seed(config.training.seed)
        dtype = precision.weight_dtype(config.training.precision)
        self.model = models.build(config.model, generator).to(device, dtype).train()
        self.model.recompute_activations = config.training.recompute_activations
        wrap = precision.WRAPPERS.get(config.training.precision, ())
        int8_weights.store(self.model, config.optimizer, self.parallel, wrap)
        self.parallel.shard(self.model)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        found = steepest.roles(self.model)
        self.roles = {p: found[n].role.value for n, p in self.model.named_parameters()}
        self.optimizer = optimizers.build(
            config.optimizer,
            self.model,
            seed=config.training.seed,
            wrap=wrap,
            nonfinite=config.training.nonfinite,
        )
        if evaluation.has_modes(self.optimizer):
            self.optimizer.train()  # type: ignore[attr-defined]
        self._takes_closure = _requires_closure(self.optimizer)
        self.batch = BatchSize(
            config.batch,
            batch_size=config.data.batch_size,
            steps=config.training.steps,
            processes=self.parallel.world_size,
        )
        norm_test.of(config.batch, self.parameters, self.parallel)  # says now if it can't work
        self.schedules = Schedules(self.optimizer, config.schedule, config.training.steps)
        self.schedules.set(*self.batch.place)
        objective, self.warnings = objective_function(self.model, config, device)
        self._objective = self.parallel.wrap(objective)

    def step(self, batch: Batch, clock: StepClock) -> tuple[Gradient, tuple[Mark, Mark]]:
        """Do one optimizer step on this process's rows of a batch.

        Returns the gradient's numbers, and when the optimizer began and ended. An optimizer that
        asks for a closure, as L-BFGS does, computes gradients in its own time.
        """
        if self._takes_closure:
            seen: list[Gradient] = []

            def closure() -> float:
                seen.append(self.gradient(batch))
                return seen[-1].loss.item()

            begin = clock.mark()
            self.optimizer.step(closure)
            gradient = seen[0]
        else:
            self._observe(batch)
            gradient = self.gradient(batch)
            begin = clock.mark()
            self.optimizer.step()
        end = clock.mark()
        wanted = gradient.statistics.get(norm_test.WANTED)
        self.advance(0.0 if wanted is None else wanted.item())
        return gradient, (begin, end)

    def advance(self, wanted_rows: float = 0.0) -> None:
        """Move on to the next step: its rows, learning rates and weight decays.

        `wanted_rows` are those that the norm test of the step taken asks for.
        """
        self.batch.advance(wanted_rows)
        if not self.batch.finished:
            self.schedules.set(*self.batch.place)

    def gradient(self, batch: Batch, *, clip: bool = True) -> Gradient:
        """Put the gradient of the batch's mean loss into the parameters, clipped if `clip`."""
        training = self.config.training
        self.optimizer.zero_grad(set_to_none=True)
        targets = self.parallel.mean((batch.targets != IGNORED).sum().float())
        losses, statistics = [], []
        test = norm_test.of(self.config.batch, self.parameters, self.parallel)
        parts = list(self.parts(batch))
        for number, part in enumerate(parts):
            with (
                self.parallel.accumulating(last=number == len(parts) - 1 and test is None),
                precision.autocast(training.precision, self.device),
            ):
                loss = self._objective(part.tokens, part.targets, part.documents, targets)
                loss.objective.backward()
            losses.append(loss.cross_entropy.detach())
            statistics.append(loss.statistics)
            if test is not None:
                test.take((part.targets != IGNORED).sum() / targets)
        if test is not None:
            test.put_back()
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = whole(torch.nn.utils.get_total_norm(gradients))
        if clip and training.clip_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, training.clip_norm, norm)
        means = {key: torch.stack([s[key] for s in statistics]).mean() for key in statistics[0]}
        if test is not None:
            means[norm_test.WANTED] = test.wanted(norm, self.batch.size)
        return Gradient(self.parallel.mean(torch.stack(losses).sum()), norm, means)

    def parts(self, batch: Batch) -> Iterator[Batch]:
        """Yield this process's rows in as many parts as its share of the accumulation has."""
        rows = self.config.data.batch_size // self.config.training.gradient_accumulation
        count = -(-len(batch.tokens) // rows)
        documents = [None] * count if batch.documents is None else batch.documents.chunk(count)
        for tokens, targets, numbers in zip(
            batch.tokens.chunk(count), batch.targets.chunk(count), documents, strict=True
        ):
            yield Batch(tokens, targets, numbers)

    def _observe(self, batch: Batch) -> None:
        """Give the optimizer the extra gradient that it declares to want before this step."""
        if not isinstance(self.optimizer, steepest.Optimizer) or not (
            wanted := self.optimizer.wants()
        ):
            return
        if "previous_weights" in wanted:
            with self.optimizer.previous_weights():
                self.gradient(batch)
        else:
            self.gradient(self._with_sampled_labels(batch), clip=False)
        self.optimizer.observe(batch_tokens=self.batch.size * self.config.data.sequence_length)

    @torch.no_grad()
    def _with_sampled_labels(self, batch: Batch) -> Batch:
        """Return the batch with targets drawn from the model's predictions, where it has any.

        The draw of a row depends on the run's seed and the row's place in the run alone.
        """
        row = self.batch.rows + self.parallel.rows(self.batch.size)[0]
        generator, drawn = torch.Generator(self.device), []
        for part in self.parts(batch):
            with precision.autocast(self.config.training.precision, self.device):
                odds = self.model(part.tokens, part.documents).float().softmax(-1)
            for of_row, targets in zip(odds, part.targets, strict=True):
                generator.manual_seed(
                    (0x5EED + (self.config.training.seed << 32) + row) % (1 << 63)
                )
                labels = torch.multinomial(of_row, 1, generator=generator)[:, 0]
                drawn.append(torch.where(targets == IGNORED, targets, labels))
                row += 1
        return Batch(batch.tokens, torch.stack(drawn), batch.documents)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs to continue to the bit."""
        rng = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        return {
            **self.parallel.state_dict(self.model, self.optimizer),
            "batch": self.batch.state_dict(),
            "rng": rng,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        self.parallel.load_model(self.model, state["model"])
        self.parallel.load_optimizer(self.model, self.optimizer, state["optimizer"])
        self.batch.load_state_dict(state["batch"])
        torch.set_rng_state(state["rng"]["cpu"])
        if self.device.type == "cuda" and "cuda" in state["rng"]:
            torch.cuda.set_rng_state(state["rng"]["cuda"], self.device)


def _requires_closure(optimizer: torch.optim.Optimizer) -> bool:
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    return closure is not None and closure.default is closure.empty
