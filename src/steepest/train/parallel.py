"""The processes that train one model together: replicas (DDP) or shards of it (FSDP2).

torchrun, Slurm's srun, or `steepest train --runtime.processes N` starts them; the environment tells
each its place.
"""

from __future__ import annotations

import atexit
import io
import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.checkpoint import state_dict as checkpoints
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from steepest.errors import UserError
from steepest.train import identity
from steepest.train.checkpoints import load_optimizer
from steepest.train.group import TIMEOUT, wait_for_all

Value = TypeVar("Value")

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

    def from_first(self, work: Callable[[], Value]) -> Value:
        """Do `work` in process 0 alone, and return what it gave there, tensors on the CPU."""
        return work()

    def once_per_machine(self, work: Callable[[], Value]) -> Value:
        """Do `work` in every process, but first in one of each machine, which leaves files."""
        return work()

    def check_same(self, values: dict[str, Any]) -> None:
        """Raise UserError unless all processes have this run config and what is beside it."""

    def rows(self, batch_size: int) -> tuple[int, int]:
        """Return the first row of a batch that is this process's, and how many are."""
        count = batch_size // self.world_size
        return self.rank * count, count

    def state_dict(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Return the whole state of both, for a checkpoint; all processes must ask."""
        return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}

    def weights(self, model: nn.Module) -> dict[str, Tensor]:
        """Return a copy of the whole model's state, for a checkpoint; all processes must ask."""
        return {name: value.clone() for name, value in model.state_dict().items()}

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
        # Buffers are tables that do not change. The argument of this is called otherwise since
        # torch 2.13, the attribute is not.
        self._wrapped.broadcast_buffers = False
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
        """Return whether the flag is set in any process; no GPU is waited for."""
        count = torch.tensor(int(flag))
        dist.all_reduce(count)
        return bool(count)

    def from_first(self, work: Callable[[], Value]) -> Value:
        """Do `work` in process 0 alone, and return what it gave there, tensors on the CPU.

        The others need not see its files.
        """
        if self.rank == 0:
            value = work()
            packed, tensors = _packed(value)
            dist.broadcast_object_list([packed], src=0)
        else:
            told = [b""]
            dist.broadcast_object_list(told, src=0)
            value, tensors = _unpacked(told[0])
        for tensor in tensors:
            dist.broadcast(tensor.contiguous().view(-1).view(torch.uint8), src=0)
        return value

    def once_per_machine(self, work: Callable[[], Value]) -> Value:
        """Do `work` in every process, but first in one of each machine, which leaves files."""
        leads = os.environ.get("LOCAL_RANK", "0") == "0"
        found = [work()] if leads else []
        self.any(False)  # waits for all
        return found[0] if leads else work()

    def check_same(self, values: dict[str, Any]) -> None:
        """Raise UserError unless all processes have this run config and what is beside it."""
        found: list[Any] = [None] * self.world_size
        dist.all_gather_object(found, values)
        for rank, other in enumerate(found):
            if differing := identity.differences(found[0], other, "process 0"):
                clauses = (
                    f"{clause.removesuffix('here')}in process {rank}" for clause in differing
                )
                raise UserError(
                    f"All processes of a run must have one config, but {', '.join(clauses)}."
                )


class Sharded(Replicated):
    """Processes with a part of every parameter each (FSDP2's fully_shard)."""

    in_step = True

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._model: FSDPModule | None = None

    def shard(self, model: Any) -> None:
        """Shard every layer, and the rest of the model, over the processes."""
        mesh = init_device_mesh(self.device.type, (self.world_size,))
        for layer in model.layers:
            fully_shard(layer, mesh=mesh)
        self._model = fully_shard(model, mesh=mesh)
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

    def weights(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the whole model's state on the CPU in process 0, and nothing in the others."""
        return dict(checkpoints.get_model_state_dict(model, options=WHOLE))  # type: ignore[arg-type]

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


def _packed(value: Any) -> tuple[bytes, list[Tensor]]:
    """Return a value as bytes without the numbers of its tensors, and those tensors."""
    tensors: list[Tensor] = []

    class Pickler(pickle.Pickler):
        def persistent_id(self, part: Any) -> Any:
            if type(part) is not Tensor or part.numel() == 0:
                return None
            tensors.append(part)
            return part.shape, part.dtype

    packed = io.BytesIO()
    Pickler(packed).dump(value)
    return packed.getvalue(), tensors


def _unpacked(packed: bytes) -> tuple[Any, list[Tensor]]:
    """Return the value that another process packed, and its tensors, whose numbers are to come."""
    tensors: list[Tensor] = []

    class Unpickler(pickle.Unpickler):
        def persistent_load(self, described: Any) -> Tensor:
            shape, dtype = described
            tensors.append(torch.empty(shape, dtype=dtype))
            return tensors[-1]

    return Unpickler(io.BytesIO(packed)).load(), tensors


def join(store: Store | None, kind: str, device: torch.device) -> tuple[Parallel, torch.device]:
    """Join the processes that share a store, if any; return them and this one's device.

    `kind` is "ddp" or "fsdp", and `device` one that any of the processes could have. Raises
    UserError where two processes would have the same GPU, FailedElsewhere where one does not come.
    """
    if store is None:
        return Parallel(), device
    if device.type == "cuda":
        device = own_gpu()
        torch.cuda.set_device(device)
    wait_for_all(store)
    if not dist.is_initialized():  # a process may do several runs
        on_gpu = device.type == "cuda"
        if on_gpu:
            _check_alone(store, device)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            store=PrefixStore("group", store),
            rank=int(os.environ["RANK"]),
            world_size=int(os.environ["WORLD_SIZE"]),
            timeout=TIMEOUT,
            device_id=device if on_gpu else None,
        )
        atexit.register(dist.destroy_process_group)
    return (Sharded(device) if kind == "fsdp" else Replicated(device)), device


def own_gpu() -> torch.device:
    """Return the GPU of this process: the only one it was given, or that of its local rank.

    Raises UserError where there is none.
    """
    local, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    given = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if count == 1 and given != [""]:  # a scheduler shows each of its tasks its own
        return torch.device("cuda", 0)
    if local >= count:
        raise UserError(
            f"There are more processes on this machine than its {count} GPUs; start one process "
            "per GPU."
        )
    return torch.device("cuda", local)


def _check_alone(store: Store, device: torch.device) -> None:
    """Raise UserError if another process has the GPU."""
    name = torch.cuda.get_device_properties(device).uuid
    if store.add(f"steepest/gpus/{name}", 1) > 1:
        raise UserError(
            f"Two processes have the same GPU, {device} here; start one process per GPU, or let "
            "all see all of a machine's GPUs in CUDA_VISIBLE_DEVICES."
        )


def check_batch(batch_size: int, world_size: int) -> None:
    """Raise UserError unless every process gets as many rows of a batch."""
    if batch_size % world_size != 0:
        raise UserError(
            f"data.batch_size is {batch_size}, which {world_size} processes cannot share equally; "
            "choose a multiple of the number of processes."
        )
