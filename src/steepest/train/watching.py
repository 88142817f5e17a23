"""Looking at steps as they are taken: how far each role moves, and the dynamics of every tensor.

Weights are copied before a step and compared after it, outside of the time that the step is said to
take. Nothing here changes a bit of the run.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steepest.train import dynamics, records
from steepest.train.config import Runtime
from steepest.train.learner import Learner
from steepest.train.parallel import whole
from steepest.train.precision import floats


class Watch:
    """Measures the steps of a run that it is told of beforehand.

    A step that is logged costs a copy of the weights while it lasts, and reading them four times.
    One with dynamics (every `runtime.dynamics_every`) also copies gradients and momentum, and takes
    what `dynamics.measure` does; all processes of a run must take part. `path` is that of
    dynamics.jsonl, None where another process writes it; records of steps after `step` are dropped,
    and `warnings` has a sentence if it is damaged.
    """

    def __init__(self, learner: Learner, runtime: Runtime, path: Path | None, step: int) -> None:
        self.learner, self.every = learner, runtime.dynamics_every
        self.named = {p: n for n, p in learner.model.named_parameters() if p.requires_grad}
        self.writer: records.MetricsWriter | None = None
        self.weights: list[Tensor] = []
        self.gradients: dict[Tensor, Tensor] = {}
        self.momenta: dict[Tensor, Tensor] = {}
        self.observing = False
        self.warnings: list[str] = []
        if self.every:
            learner.optimizer.register_step_pre_hook(self._copy_gradients)
        if path is not None and (self.every or path.exists()):
            self.warnings = records.truncate_metrics(path, step)
            self.writer = records.MetricsWriter(path)

    def before(self, step: int, *, logged: bool) -> None:
        """Copy what is to be compared after `step`."""
        self.observing = self.every > 0 and step % self.every == 0
        if logged or self.observing:
            self.weights = [floats(p).clone() for p in self.named]
        if self.observing:
            for p in self.named:
                momentum = dynamics.momentum_of(self.learner.optimizer.state.get(p, {}), p.shape)
                if momentum is not None:
                    self.momenta[p] = momentum.detach().clone()

    @torch.no_grad()
    def after(self, step: int) -> dict[str, Tensor]:
        """Write the dynamics of `step` if it is due; return what each role moved.

        That is ||W' - W|| / ||W|| over all tensors of the role, 0-d; empty if nothing was copied.
        """
        if self.observing:
            self._write_dynamics(step)
        squares: dict[str, tuple[Tensor, Tensor]] = {}
        for p, old in zip(self.named, self.weights, strict=False):
            size = whole(torch.linalg.vector_norm(old, dtype=torch.float32)) ** 2
            move = whole(torch.linalg.vector_norm(old.sub_(floats(p)), dtype=torch.float32)) ** 2
            role = self.learner.roles[p]
            moves, sizes = squares.get(role, (torch.zeros_like(move), torch.zeros_like(size)))
            squares[role] = moves + move, sizes + size
        self.weights = []
        return {role: (moves / sizes).sqrt() for role, (moves, sizes) in squares.items()}

    def close(self) -> None:
        """Close dynamics.jsonl."""
        if self.writer is not None:
            self.writer.close()

    def sync(self) -> None:
        """Wait until all records are on the disk."""
        if self.writer is not None:
            self.writer.sync()

    def _copy_gradients(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Copy gradients where the optimizer may change them; a closure has yet to compute its."""
        if self.observing and not any(map(callable, (*args, *kwargs.values()))):
            self.gradients = {p: p.grad.clone() for p in self.named if p.grad is not None}

    def _write_dynamics(self, step: int) -> None:
        for (p, name), before in zip(self.named.items(), self.weights, strict=True):
            gradient, momentum = self.gradients.get(p, p.grad), self.momenta.get(p)
            old, new = whole(before), whole(floats(p))
            gradient = None if gradient is None else whole(gradient)
            momentum = None if momentum is None else whole(momentum)
            if self.writer is None:  # the process that writes needed this one's parts, no more
                continue
            role, layer = self.learner.roles[p], re.search(r"\.(\d+)\.", name)
            matrices = p.ndim > 1 and role != "vector"
            measured = dynamics.measure(old, new, gradient, momentum, matrices=matrices)
            place = {"step": step, "name": name, "role": role}
            numbered = {"layer": None if layer is None else int(layer[1])}
            self.writer.write({**place, **numbered, **measured.as_record()})
        self.gradients, self.momenta = {}, {}
