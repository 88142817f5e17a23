"""The norm test: whether a batch is large enough for its gradient to be told from noise."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from steepest.errors import UserError
from steepest.train.batch_size import BatchConfig
from steepest.train.parallel import Parallel

WANTED = "norm_test_rows"
"""Name, among a step's statistics, of the rows that the test asks for."""


def of(config: BatchConfig, parameters: Sequence[Tensor], parallel: Parallel) -> NormTest | None:
    """Return the test of a batch, if the config asks for it."""
    return None if config.eta is None else NormTest(config.eta, parameters, parallel)


class NormTest:
    """Adds up the gradients of a batch's parts, and compares them.

    With g the gradient of a batch of b rows and Var the variance of a row's gradient, summed over
    the elements, the test is Var / b <= eta^2 |g|^2, and where it fails the next batch has
    Var / (eta^2 |g|^2) rows (Byrd et al., 2012; AdAdaGrad, Lau et al., 2024, arXiv:2402.11215). The
    variance is that between the gradients g_j of J parts, as between those of workers in Lau et
    al., 2025, arXiv:2412.21124:

    Var = b sum_j s_j |g_j - g|^2 / (J - 1), with s_j the part's share of the batch's targets

    Between equal parts of m rows that is m times the sample variance of the g_j. Gradients of the
    parameters are taken away part by part, so it needs memory for two. Raises UserError where
    processes hold shards of a parameter, whose gradients are summed before they can be compared.
    """

    def __init__(self, eta: float, parameters: Sequence[Tensor], parallel: Parallel) -> None:
        if any(isinstance(p, DTensor) for p in parameters):
            raise UserError("batch.schedule norm_test does not work with sharded parameters.")
        self.eta, self.parameters, self.parallel = eta, parameters, parallel
        self.sums: list[Tensor | None] = [None] * len(parameters)
        self.squares: list[Tensor] = []

    def take(self, share: Tensor) -> None:
        """Take the gradients of a part of the loss, the part's own times `share`.

        That is, 0-d, its number of targets over that of a process, on average.
        """
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        square = torch.nn.utils.get_total_norm(gradients).double() ** 2
        self.squares.append(square / share.clamp(min=torch.finfo(share.dtype).tiny))
        for index, parameter in enumerate(self.parameters):
            if parameter.grad is None:
                continue
            held = self.sums[index]
            self.sums[index] = parameter.grad if held is None else held.add_(parameter.grad)
            parameter.grad = None

    def put_back(self) -> None:
        """Give the parameters the gradients of the batch, of all processes."""
        processes = self.parallel.world_size
        for parameter, total in zip(self.parameters, self.sums, strict=True):
            if total is not None:
                parameter.grad = self.parallel.sum(total) / processes if processes > 1 else total

    def wanted(self, norm: Tensor, rows: int) -> Tensor:
        """Return how many rows the test asks for, 0-d float64, given the norm of the gradient of
        `rows` rows; 0 if it cannot tell, as the gradient is 0 or not finite.
        """
        square = norm.double() ** 2
        parts = self.parallel.sum(torch.tensor(float(len(self.squares)), device=norm.device))
        between = self.parallel.mean(torch.stack(self.squares).sum()) - square
        asked = rows * between / ((parts - 1) * self.eta**2 * square)
        return asked.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).clamp(min=0.0)
