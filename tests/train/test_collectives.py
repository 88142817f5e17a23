"""What several processes send each other in a step: gradients once, and nothing constant."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from steepest.data import Batch
from steepest.models import ARCHITECTURES, build
from steepest.train import RunConfig
from steepest.train.learner import Learner
from steepest.train.parallel import Replicated, Sharded, join

from .conftest import MakeConfig
from .test_parallel import free_port


def count_collectives(rank: int, port: int, folder: str, files: list[str]) -> None:
    """Write how often each collective is called for a gradient, per way and config."""
    store = dist.TCPStore("127.0.0.1", port, 2, is_master=rank == 0)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    cpu = torch.device("cpu")
    join(store, "ddp", cpu)
    found: dict[str, list[dict[str, int]]] = {"ddp": [], "fsdp": []}
    for way, kind in (("ddp", Replicated), ("fsdp", Sharded)):
        for file in files:
            learner = Learner(RunConfig.from_toml(Path(file)), cpu, kind(cpu))
            batch = Batch(*torch.randint(300, (2, 4, 16)))
            for _ in range(2):  # DDP arranges its buckets after the first
                learner.gradient(batch)
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
                learner.gradient(batch)
            calls = [e.name for e in seen.events() if e.name.startswith("c10d::")]
            found[way].append(dict(Counter(calls)))
    Path(folder, f"{rank}.json").write_text(json.dumps(found))


@pytest.mark.slow
def test_processes_exchange_gradients_once_however_many_parts(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    parts = (1, 2, 4)
    files = [str(tmp_path / f"{count}.toml") for count in parts]
    for file, count in zip(files, parts, strict=True):
        config = make_config(name="adamw", batch_size=8, gradient_accumulation=2 * count)
        Path(file).write_text(config.to_toml())
    mp.spawn(count_collectives, args=(free_port(), str(tmp_path), files), nprocs=2)
    for rank in (0, 1):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found["ddp"][0] == found["ddp"][1] == found["ddp"][2]
        assert found["ddp"][0].keys() == {"c10d::allreduce_"}
        gathers = [calls.pop("c10d::_allgather_base_") for calls in found["fsdp"]]
        assert gathers == [count * gathers[0] for count in parts]  # weights, which parts need
        assert found["fsdp"][0] == found["fsdp"][1] == found["fsdp"][2]
        assert found["fsdp"][0]["c10d::_reduce_scatter_base_"] > 0


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_buffers_of_models_are_constants_that_need_no_exchange(name: str) -> None:
    config = ARCHITECTURES[name][0](vocab_size=300, hidden_size=64, layers=1)
    model = build(config, torch.Generator().manual_seed(0)).train()
    before = {key: value.clone() for key, value in model.named_buffers()}
    tokens = torch.arange(64).reshape(4, 16)
    model.loss(tokens, tokens).backward()  # type: ignore[no-untyped-call]
    assert not before.keys() & model.state_dict().keys()
    assert all(torch.equal(value, before[key]) for key, value in model.named_buffers())
