"""Data parallelism: two processes that share gradients are one with both batches."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import problems
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import steepest

OPTIONS: dict[str, dict[str, Any]] = {
    "adamw": {"lr": 3e-3, "weight_decay": 0.1},
    "muon": {"lr": 0.02, "adam_lr": 3e-3, "ns_dtype": "float32"},
    "scion_light": {"lr": 1e-4, "ns_dtype": "float32"},  # its momentum is in the gradients
}
VIEWS = (False, True)
STEPS = 6

Trained = dict[tuple[str, bool], list[Tensor]]


class WithLoss(nn.Module):
    """A model whose forward is its loss, as DDP wants it."""

    def __init__(self) -> None:
        super().__init__()
        self.model = problems.llama()

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        return self.model.loss(tokens, targets)


def train(name: str, rank: int | None, views: bool = False) -> list[Tensor]:
    """Return the trained weights: of half of each batch in a process, or of all in one.

    With `views`, gradients are in the memory that DDP exchanges, the same at every step.
    """
    wrapped: nn.Module = WithLoss()
    if rank is not None:
        wrapped = DistributedDataParallel(wrapped, gradient_as_bucket_view=views)
    optimizer = steepest.create(name, wrapped, **OPTIONS[name])
    for tokens, targets in problems.batches(count=STEPS, rows=4):
        rows = slice(None) if rank is None else slice(2 * rank, 2 * rank + 2)
        optimizer.zero_grad()
        wrapped(tokens[rows], targets[rows]).backward()
        optimizer.step()
    return [p.detach() for p in wrapped.parameters()]


def process(rank: int, folder: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        trained = {(name, views): train(name, rank, views) for name in OPTIONS for views in VIEWS}
        torch.save(trained, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def of_processes(tmp_path_factory: pytest.TempPathFactory) -> list[Trained]:
    folder: Path = tmp_path_factory.mktemp("ddp")
    mp.spawn(process, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("views", VIEWS)
@pytest.mark.parametrize("name", OPTIONS)
def test_two_processes_are_one(name: str, views: bool, of_processes: list[Trained]) -> None:
    first, second = (trained[name, views] for trained in of_processes)
    alone = train(name, None)
    start = [p.detach() for p in WithLoss().parameters()]
    for a, b, one, p0 in zip(first, second, alone, start, strict=True):
        assert torch.equal(a, b)
        # Adam magnifies rounding where a gradient is near zero, so not all of 1e-6 at each element.
        assert (a - one).norm() <= 1e-4 * (one - p0).norm()
        torch.testing.assert_close(a, one, rtol=1e-6, atol=1e-6)
