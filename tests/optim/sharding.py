"""Models and trainings that are tried sharded over processes, and how they run there."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import problems
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from made_up_rules import Averaging, Halving, Normed
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import steepest
from steepest.optim import Hyper, Rule, State, random

STEPS, MIDDLE, ROWS = 6, 3, 4


class WithLoss(nn.Module):
    """A LLaMA whose forward is its loss: FSDP2 gathers parameters around forward."""

    def __init__(self, **changes: Any) -> None:
        super().__init__()
        self.model = problems.llama(**changes)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        return self.model.loss(tokens, targets)

    def parts(self) -> list[nn.Module]:
        return list(self.model.layers)


class Conv1D(nn.Module):
    """A linear layer stored [in, out], as in GPT-2 of Hugging Face."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.nf = outputs
        self.weight = nn.Parameter(torch.randn(inputs, outputs) / inputs**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Fused(nn.Module):
    """Matrices that are stepped block by block: fused, stored [in, out], and a bank of experts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(64, 10)
        self.c_attn = Conv1D(10, 30)
        self.c_proj = Conv1D(10, 6)
        self.experts = nn.Parameter(torch.randn(3, 6, 10) / 3)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        q, k, v = self.c_attn(self.embed(tokens)).chunk(3, -1)
        x = torch.tanh(self.c_proj(q * torch.sigmoid(k) + v))
        y = torch.einsum("bti,eio->bto", x, self.experts)
        return torch.mean((y - self.embed(targets)) ** 2)

    def parts(self) -> list[nn.Module]:
        return [self.c_attn]


class Dense(nn.Module):
    """Two square layers whose gradients have full rank."""

    def __init__(self, size: int = 6) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.register_buffer("values", torch.randn(2, 64, size, dtype=torch.float64))
        self.first, self.second = (nn.Linear(size, size, dtype=torch.float64) for _ in range(2))

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        y = self.second(torch.tanh(self.first(self.values[0, tokens])))
        return torch.mean((y - self.values[1, targets]) ** 2)

    def parts(self) -> list[nn.Module]:
        return []


@dataclass(frozen=True)
class Noisy(Rule):
    """Moves at random."""

    lr: float = 0.01
    elementwise: ClassVar[bool] = True
    draws: ClassVar[bool] = True

    def init(self, param: Tensor) -> State:
        return {}

    def update(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> tuple[Tensor, State]:
        return random.normal(random.fold(state["key"], h.step), grad.shape), {}


# Over four processes some shards of the uneven model are smaller than others, and some are empty.
MODELS: dict[str, Callable[[], Any]] = {
    "even": WithLoss,
    "uneven": functools.partial(
        WithLoss, vocab_size=65, hidden_size=6, heads=1, intermediate_size=9
    ),
    "fused": Fused,
    "dense": Dense,
    "wide": functools.partial(Dense, 8),
}


@dataclass(frozen=True)
class Job:
    """One training: an optimizer, a model, and how it is saved in the middle."""

    optimizer: str | Rule
    options: Mapping[str, Any] = field(default_factory=dict)
    model: str = "even"
    way: str | None = "dcp"
    """How it is saved, None for not at all."""
    replicas: int = 1
    """Groups of processes that each hold the whole model (HSDP)."""
    tensors: int = 1
    """Processes that share the columns of a layer (tensor parallelism)."""
    exchanged: bool = False
    """Made before sharding, with the parameters exchanged then, as Accelerate does."""
    worlds: tuple[int, ...] = (2, 4)
    """Numbers of processes to try."""

    def make(self, module: nn.Module) -> steepest.Optimizer:
        return steepest.create(self.optimizer, module, **self.options)


OPTIONS: dict[str, dict[str, Any]] = {
    "adamw": {"lr": 3e-3, "weight_decay": 0.1},
    "muon": {"lr": 0.02, "adam_lr": 3e-3, "ns_dtype": "float32"},
    "soap": {"lr": 3e-3, "update_interval": 3},
    "adafactor": {"lr": 3e-3},
    "prodigy": {},
    "galore_adamw": {"lr": 3e-3, "rank": 4, "update_interval": 3},
    "lamb": {"lr": 3e-3},
    "schedulefree_adamw": {"lr": 3e-3},
}
NAMES = list(OPTIONS)
SAVED = ("adamw", "muon")
"""Also saved by four processes, which takes a third of the time."""
JOBS = {
    **{name: Job(name, OPTIONS[name], worlds=(2,)) for name in NAMES},
    **{
        f"{name} uneven": Job(
            name, OPTIONS[name], "uneven", "dcp" if name in SAVED else None, worlds=(4,)
        )
        for name in NAMES
    },
    "adamw": Job("adamw", OPTIONS["adamw"]),
    "muon": Job("muon", OPTIONS["muon"]),
    "muon fused": Job("muon", OPTIONS["muon"], "fused"),
    "soap dense": Job("soap", OPTIONS["soap"], "dense"),
    "muon flat": Job("muon", OPTIONS["muon"], "uneven", way="flat", worlds=(2,)),
    "muon full": Job("muon", OPTIONS["muon"], "uneven", way="full", worlds=(2,)),
    "adamw full": Job("adamw", OPTIONS["adamw"], "uneven", way="full", worlds=(2,)),
    "muon replicas": Job("muon", OPTIONS["muon"], "uneven", replicas=2, worlds=(4,)),
    "muon tensors": Job("muon", OPTIONS["muon"], "wide", tensors=2, worlds=(4,)),
    "adamw tensors": Job("adamw", OPTIONS["adamw"], "wide", tensors=2, worlds=(4,)),
    "muon exchanged": Job("muon", OPTIONS["muon"], "uneven", exchanged=True, worlds=(2,)),
    "sums over all parameters": Job(Normed(), model="uneven"),
    "sums over all replicas": Job(Normed(), model="uneven", replicas=2, worlds=(4,)),
    "random numbers": Job(Noisy(), model="uneven", worlds=(4,)),
    "evaluation weights": Job(Averaging(), model="uneven", worlds=(4,)),
    "kept gradients": Job(Halving(lr=0.01), model="uneven", worlds=(2,)),
}
UNDETERMINED = {"soap", "soap uneven"}
"""Where a gradient has less than full rank, rounding decides part of an eigenbasis: a relative
change of 1e-7 in the gradients leads as far from the path as another number of processes."""


def shard(module: Any, job: Job) -> None:
    sizes = (job.replicas, dist.get_world_size() // job.replicas // job.tensors, job.tensors)
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("replica", "shard", "tensor"))
    if job.tensors > 1:
        plan = {"first": ColwiseParallel(), "second": RowwiseParallel()}
        parallelize_module(module, mesh["tensor"], plan)
    mesh = mesh["replica", "shard"] if job.replicas > 1 else mesh["shard"]
    for part in module.parts():
        fully_shard(part, mesh=mesh)
    fully_shard(module, mesh=mesh)


def sharded(job: Job, module: Any) -> steepest.Optimizer:
    """Return the optimizer of a module, sharded."""
    if not job.exchanged:
        shard(module, job)
        return job.make(module)
    names = {p: name for name, p in module.named_parameters()}
    optimizer = job.make(module)
    optimizer.load_state_dict(optimizer.state_dict())
    shard(module, job)
    parameters = dict(module.named_parameters())
    for group in optimizer.param_groups:
        group["params"] = [parameters[names[p]] for p in group["params"]]
    return optimizer


def train(
    module: nn.Module, optimizer: steepest.Optimizer, steps: range, rank: int = 0, world: int = 1
) -> None:
    """Step on this process's rows of every batch."""
    for tokens, targets in problems.batches(count=STEPS, rows=ROWS)[steps.start : steps.stop]:
        rows = slice(rank * ROWS // world, (rank + 1) * ROWS // world)
        optimizer.zero_grad()
        module(tokens[rows], targets[rows]).backward()
        optimizer.step()


def whole(module: nn.Module) -> list[Tensor]:
    return [
        (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for p in module.parameters()
    ]


FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
SAVING = StateDictOptions(full_state_dict=True, cpu_offload=True)
LOADING = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)


def save(way: str, module: nn.Module, optimizer: steepest.Optimizer, folder: str) -> None:
    if way == "full":  # One file with everything, of the first process.
        states = get_state_dict(module, optimizer, options=SAVING)
        if dist.get_rank() == 0:
            torch.save(states, f"{folder}.pt")
        dist.barrier()
    else:
        options = FLAT if way == "flat" else None
        model, state = get_state_dict(module, optimizer, options=options)
        dcp.save({"model": model, "optimizer": state}, checkpoint_id=folder)


def load(way: str, module: nn.Module, optimizer: steepest.Optimizer, folder: str) -> None:
    if way == "full":
        mine = dist.get_rank() == 0
        states = torch.load(f"{folder}.pt", weights_only=True) if mine else ({}, {})
        options: StateDictOptions | None = LOADING
    else:
        options = FLAT if way == "flat" else None
        model, state = get_state_dict(module, optimizer, options=options)
        seen = {"model": model, "optimizer": state}
        dcp.load(seen, checkpoint_id=folder)
        states = seen["model"], seen["optimizer"]
    set_model_state_dict(module, states[0], options=options)
    set_optimizer_state_dict(module, optimizer, states[1], options=options)


def run(job: Job, label: str, folder: str) -> dict[str, list[Tensor]]:
    """Train, and train again from the middle; return the whole weights after each."""
    place = dist.get_rank() // job.tensors, dist.get_world_size() // job.tensors
    module, other = MODELS[job.model](), MODELS[job.model]()
    found: dict[str, list[Tensor]] = {}
    optimizer = sharded(job, module)
    train(module, optimizer, range(MIDDLE), *place)
    if job.way is not None:
        save(job.way, module, optimizer, f"{folder}/{label}")
    train(module, optimizer, range(MIDDLE, STEPS), *place)
    found["trained"] = whole(module)
    optimizer.eval()
    found["evaluated"] = whole(module)
    optimizer.train()
    if job.way is None:
        return found
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    resumed = sharded(job, other)
    load(job.way, other, resumed, f"{folder}/{label}")
    train(other, resumed, range(MIDDLE, STEPS), *place)
    found["resumed"] = whole(other)
    return found


def refuse(folder: str) -> dict[str, Any]:
    """Return weights before and after a step with a NaN in one shard, and the skipped steps."""
    place = dist.get_rank(), dist.get_world_size()
    job = Job("muon", {**OPTIONS["muon"], "nonfinite": "skip"}, "uneven")
    module = MODELS[job.model]()
    optimizer = sharded(job, module)
    train(module, optimizer, range(1), *place)
    before = whole(module)
    grad = module.model.lm_head.weight.grad
    if place[0] == 0:
        grad.to_local()[0, 0] = torch.nan
    optimizer.step()
    return {"before": before, "after": whole(module), "skipped": optimizer.skipped_steps}


def exchanges() -> dict[str, int]:
    """Return the number of shapes that a step of muon gathers, and of its exchanges."""
    job = JOBS["muon"]
    module = MODELS[job.model]()
    optimizer = sharded(job, module)
    train(module, optimizer, range(1), dist.get_rank(), dist.get_world_size())
    with CommDebugMode() as seen:
        optimizer.step()
    hidden = {p.shape for g in optimizer.param_groups if g["rule"] == "muon" for p in g["params"]}
    return {"shapes": len(hidden), "exchanges": seen.get_total_counts()}


def spread(folder: str) -> dict[str, list[Tensor]]:
    """Return the weights after continuing, sharded, what one process began."""
    module, job = Fused(), JOBS["muon fused"]
    weights, state = torch.load(f"{folder}/alone.pt", weights_only=True)
    module.load_state_dict(weights)
    optimizer = sharded(job, module)
    optimizer.load_state_dict(state)
    train(module, optimizer, range(MIDDLE, STEPS), dist.get_rank(), dist.get_world_size())
    return {"trained": whole(module)}


def process(rank: int, world: int, folder: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world
    )
    try:
        mine = {label: job for label, job in JOBS.items() if world in job.worlds}
        found: dict[str, Any] = {label: run(job, label, folder) for label, job in mine.items()}
        found |= {"refused": refuse(folder), "spread": spread(folder), "counts": exchanges()}
        if rank == 0:
            torch.save(found, f"{folder}/found.pt")
    finally:
        dist.destroy_process_group()
