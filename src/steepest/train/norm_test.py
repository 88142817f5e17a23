"""The norm test: whether a batch is large enough for its gradient to be told from noise."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from steepest.errors import UserError
from steepest.train import precision
from steepest.train.config import RunConfig
from steepest.train.parallel import Parallel

WANTED = "norm_test_rows"
"""Name, among a step's statistics, of the rows that the test asks for."""


def of(config: RunConfig, model: nn.Module, parallel: Parallel) -> NormTest | None:
    """Return the test of a run's batches, if its config asks for it.

    Call it once for a model, after it has been sharded. Raises UserError where processes would
    compare smaller parts than one process does, and so ask for other batches.
    """
    if config.batch.eta is None:
        return None
    parts = config.training.gradient_accumulation
    if parts % parallel.world_size:
        raise UserError(
            f"batch.schedule norm_test compares {parts} parts of a batch, which "
            f"{parallel.world_size} processes cannot share equally; make "
            "training.gradient_accumulation a multiple of the number of processes."
        )
    return NormTest(config.batch.eta, model, parallel)


class NormTest:
    """Compares the gradients of a batch's parts as they come by.

    With g the gradient of a batch of b rows and Var the variance of a row's gradient, summed over
    the elements, the test is Var / b <= eta^2 |g|^2, and where it fails the next batch has
    Var / (eta^2 |g|^2) rows (Byrd et al., 2012; AdAdaGrad, Lau et al., 2024, arXiv:2402.11215). The
    variance is that between the gradients g_j of J parts, as between those of workers in Lau et
    al., 2025, arXiv:2412.21124:

    Var = b sum_j s_j |g_j - g|^2 / (J - 1), with s_j the part's share of the batch's targets

    Between equal parts of m rows that is m times the sample variance of the g_j. As g is the mean
    of the g_j, the sum is that of s_j |g_j|^2 less |g|^2, so that no gradient is kept. A process
    has the whole gradient of its parts on its way to the sum over parts and processes, also where
    it holds but shards of that sum.
    """

    def __init__(self, eta: float, model: nn.Module, parallel: Parallel) -> None:
        self.eta, self.parallel = eta, parallel
        self.begin()
        for parameter in _as_differentiated(model):
            parameter.register_hook(self._see)  # type: ignore[no-untyped-call]

    def begin(self) -> None:
        """Begin with another batch."""
        self._gradients: list[Tensor] = []
        self._squares: list[Tensor] = []
        self._shares: list[Tensor] = []

    def _see(self, gradient: Tensor) -> None:
        self._gradients.append(precision.norm([gradient]))

    def take(self, share: Tensor) -> None:
        """Take the gradients seen since the last part as those of a part, its own times `share`.

        That is, 0-d, its number of targets over that of a process, on average.
        """
        square = torch.stack(self._gradients).double().square().sum()
        self._gradients = []
        self._squares.append(square / share.clamp(min=torch.finfo(share.dtype).tiny))
        self._shares.append(share)

    def wanted(self, norm: Tensor, rows: int) -> Tensor:
        """Return how many rows the test asks for, 0-d float64, given the norm of the gradient of
        `rows` rows; 0 if it cannot tell, as the gradient is 0 or not finite.
        """
        square = norm.double() ** 2
        parts = self.parallel.sum((torch.stack(self._shares) > 0).sum().double())
        between = self.parallel.mean(torch.stack(self._squares).sum()) - square
        asked = rows * between / ((parts - 1) * self.eta**2 * square)
        return asked.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).clamp(min=0.0)


def _as_differentiated(model: nn.Module) -> Iterator[Tensor]:
    """Yield the parameters that gradients come to: of FSDP's, the whole ones."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.unshard()
            yield from _whole(module)
            module.reshard()
    yield from _whole(model)


def _whole(module: nn.Module) -> Iterator[Tensor]:
    return (p for p in module.parameters() if p.requires_grad and not isinstance(p, DTensor))
