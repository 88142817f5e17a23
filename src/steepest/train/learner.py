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
    """What else the model told, by name: means over the parts of the batch, of all processes."""


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
        self._norm_test = norm_test.of(config, self.model, self.parallel)
        self.schedules = Schedules(self.optimizer, config.schedule, config.training.steps)
        self.schedules.set(*self.batch.place)
        mine = self.parallel.rows(self.batch.size)[1]
        self._objective, self.warnings = objective_function(
            self.model, config, device, self.parallel, rows=-(-mine // self._parts(mine))
        )

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
        test = self._norm_test
        if test is not None:
            test.begin()
        parts = list(self.parts(batch))
        for number, part in enumerate(parts):
            with self.parallel.accumulating(last=number == len(parts) - 1):
                with precision.autocast(training.precision, self.device):
                    loss = self._objective(part.tokens, part.targets, part.documents, targets)
                # Autocast would round what the forward pass kept in float32.
                loss.objective.backward()
            losses.append(loss.cross_entropy.detach())
            statistics.append(loss.statistics)
            if test is not None:
                test.take((part.targets != IGNORED).sum() / targets)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = whole(precision.norm(gradients))
        if clip and training.clip_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, training.clip_norm, norm)
        means = [torch.stack([s[key] for s in statistics]).mean() for key in statistics[0]]
        told = self.parallel.mean(torch.stack([torch.stack(losses).sum(), *means])).unbind()
        named = dict(zip(statistics[0], told[1:], strict=True))
        if test is not None:
            named[norm_test.WANTED] = test.wanted(norm, self.batch.size)
        return Gradient(told[0], norm, named)

    def parts(self, batch: Batch) -> Iterator[Batch]:
        """Yield this process's rows in as many parts as its share of the accumulation has."""
        count = self._parts(len(batch.tokens))
        documents = [None] * count if batch.documents is None else batch.documents.chunk(count)
        for tokens, targets, numbers in zip(
            batch.tokens.chunk(count), batch.targets.chunk(count), documents, strict=True
        ):
            yield Batch(tokens, targets, numbers)

    def _parts(self, rows: int) -> int:
        """Return the number of parts that so many rows of a process make."""
        most = self.config.data.batch_size // self.config.training.gradient_accumulation
        return -(-rows // most)

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
            self._weigh_targets(batch)
        self.optimizer.observe(batch_tokens=self._batch_tokens)

    @property
    def _batch_tokens(self) -> int:
        return self.batch.size * self.config.data.sequence_length

    def _weigh_targets(self, batch: Batch) -> None:
        """Scale gradients such that their squares times all tokens are theirs times the targets.

        An estimate of curvature is the square times the number of tokens with a loss, which only
        the device knows where some have none.
        """
        if self.config.data.packing == "contiguous":
            return
        targets = self.parallel.sum((batch.targets != IGNORED).sum())
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        torch._foreach_mul_(gradients, (targets / self._batch_tokens).sqrt())

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
                # What torch.multinomial does, but that refuses odds that are not finite.
                noise = torch.empty_like(of_row).exponential_(generator=generator)
                labels = (of_row / noise).argmax(-1)
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
