"""The processes that train one model together: replicas (DDP) or shards of it (FSDP2).

torchrun, or on one machine `steepest train --runtime.processes N`, starts them and tells each its
place in the environment.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as checkpoints
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from steepest.errors import UserError
from steepest.train.checkpoints import load_optimizer

WHOLE = checkpoints.StateDictOptions(full_state_dict=True, cpu_offload=True)


class Parallel:
    """This process's place among those of a run, and what they do together.

    This class is a run of one process, for which most of it is nothing.
    """

    rank = 0
    """Number of this process."""
    world_size = 1
    """How many processes there are."""
    in_step = False
    """Whether a forward pass needs all processes to do one, too."""

    def shard(self, model: nn.Module) -> None:
        """Split a model's parameters between the processes, before its optimizer is made."""

    def wrap(self, objective: nn.Module) -> nn.Module:
        """Return a module that computes a loss such that its gradients are means over all."""
        return objective

    @contextmanager
    def accumulating(self, *, last: bool) -> Iterator[None]:
        """Hold back the exchange of gradients until the last part of a batch."""
        yield

    def mean(self, value: Tensor) -> Tensor:
        """Return the mean of a tensor over the processes."""
        return value

    def sum(self, value: Tensor) -> Tensor:
        """Return the sum of a tensor over the processes."""
        return value

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set in any process."""
        return flag

    def rows(self, batch_size: int) -> tuple[int, int]:
        """Return the first row of a batch that is this process's, and how many are."""
        count = batch_size // self.world_size
        return self.rank * count, count

    def state_dict(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Return the whole state of both, for a checkpoint; all processes must ask."""
        return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}

    def load_model(self, model: nn.Module, state: dict[str, Any]) -> None:
        """Give the model its state of a checkpoint."""
        model.load_state_dict(state)

    def load_optimizer(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]
    ) -> None:
        """Give the optimizer its state of a checkpoint."""
        load_optimizer(optimizer, state)


class Replicated(Parallel):
    """Processes with a replica of the model each (DistributedDataParallel)."""

    def __init__(self, device: torch.device) -> None:
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.device = device
        self._wrapped: DistributedDataParallel | None = None

    def wrap(self, objective: nn.Module) -> nn.Module:
        """Return the objective in DistributedDataParallel."""
        gpus = [self.device] if self.device.type == "cuda" else None
        self._wrapped = DistributedDataParallel(
            objective, device_ids=gpus, gradient_as_bucket_view=True
        )
        return self._wrapped

    @contextmanager
    def accumulating(self, *, last: bool) -> Iterator[None]:
        """Exchange gradients with the last part alone."""
        assert self._wrapped is not None
        with nullcontext() if last else self._wrapped.no_sync():
            yield

    def mean(self, value: Tensor) -> Tensor:
        """Return the mean of a tensor over the processes, the same bits in each."""
        return self.sum(value) / self.world_size

    def sum(self, value: Tensor) -> Tensor:
        """Return the sum of a tensor over the processes, the same bits in each."""
        total = value.detach().clone()
        dist.all_reduce(total)
        return total

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set in any process; on GPUs this waits for them."""
        return bool(self.sum(torch.tensor(float(flag), device=self.device)))


class Sharded(Replicated):
    """Processes with a part of every parameter each (FSDP2's fully_shard)."""

    in_step = True

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._model: FSDPModule | None = None

    def shard(self, model: Any) -> None:
        """Shard every layer, and the rest of the model, over the processes."""
        for layer in model.layers:
            fully_shard(layer)
        self._model = fully_shard(model)
        for method in ("objective", "loss"):
            register_fsdp_forward_method(model, method)

    def wrap(self, objective: nn.Module) -> nn.Module:
        """Return the objective as it is: the model in it gathers its own parameters."""
        return objective

    @contextmanager
    def accumulating(self, *, last: bool) -> Iterator[None]:
        """Exchange gradients with the last part alone."""
        assert self._model is not None
        self._model.set_requires_gradient_sync(last)
        yield

    def state_dict(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Return the whole state of both in process 0, and nothing in the others."""
        weights, state = checkpoints.get_state_dict(model, optimizer, options=WHOLE)
        return {"model": weights, "optimizer": state}

    def load_model(self, model: nn.Module, state: dict[str, Any]) -> None:
        """Give every process its part of the weights."""
        checkpoints.set_model_state_dict(
            model, state, options=checkpoints.StateDictOptions(full_state_dict=True)
        )

    def load_optimizer(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]
    ) -> None:
        """Give every process its part of the optimizer's state."""
        checkpoints.set_optimizer_state_dict(
            model, optimizer, state, options=checkpoints.StateDictOptions(full_state_dict=True)
        )


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor whole that processes may hold parts of."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def join(kind: str, device: torch.device) -> tuple[Parallel, torch.device]:
    """Join the processes that were started together, if so; return them and this one's device.

    `kind` is "ddp" or "fsdp". Raises UserError where there are more processes than GPUs.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        return Parallel(), device
    if device.type == "cuda":
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            raise UserError(
                f"There are more processes on this machine than its {torch.cuda.device_count()} "
                "GPUs; start one process per GPU."
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if not dist.is_initialized():  # a process may do several runs
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(dist.destroy_process_group)
    return (Sharded(device) if kind == "fsdp" else Replicated(device)), device


def check_batch(batch_size: int, world_size: int) -> None:
    """Raise UserError unless every process gets as many rows of a batch."""
    if batch_size % world_size != 0:
        raise UserError(
            f"data.batch_size is {batch_size}, which {world_size} processes cannot share equally; "
            "choose a multiple of the number of processes."
        )
