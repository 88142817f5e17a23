"""Several processes measure the same as one."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch.multiprocessing as mp

from steepest.train import RunConfig, Runtime, read_metrics, run

from .conftest import MakeConfig


def one_process(rank: int, port: int, folder: str, file: str) -> None:
    """Do the run as torchrun's process `rank` of 2 would, holding a part of the model."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo",
    )  # fmt: skip
    runtime = Runtime(threads=1, log_every=2, dynamics_every=2, parallel="fsdp")
    run(RunConfig.from_toml(Path(file)), Path(folder), runtime=runtime)


def records(folder: Path, name: str) -> list[dict[str, Any]]:
    (path,) = folder.glob(f"*/{name}.jsonl")
    return read_metrics(path)


@pytest.mark.slow
def test_parts_of_a_model_are_measured_as_a_whole(make_config: MakeConfig, tmp_path: Path) -> None:
    settings = {"adam_lr": 1e-2, "ns_dtype": "float32"}
    config = make_config(name="muon", lr=2e-2, options=settings, steps=5)
    file = tmp_path / "run.toml"
    file.write_text(config.to_toml())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(one_process, args=(port, str(tmp_path / "two"), str(file)), nprocs=2)
    runtime = Runtime(threads=1, log_every=2, dynamics_every=2)
    run(config, tmp_path / "one", runtime=runtime)

    one, two = (records(tmp_path / way, "dynamics") for way in ("one", "two"))
    assert [(r["step"], r["name"]) for r in one] == [(r["step"], r["name"]) for r in two]
    for left, right in zip(one, two, strict=True):
        assert left.keys() == right.keys()
        for key in left.keys() - {"name", "role", "layer"}:
            assert right[key] == pytest.approx(left[key], rel=5e-3, abs=5e-3), key
    one, two = (
        [r for r in records(tmp_path / way, "metrics") if r["kind"] == "train"]
        for way in ("one", "two")
    )
    for left, right in zip(one, two, strict=True):
        assert right["update_ratio"] == pytest.approx(left["update_ratio"], rel=1e-3)
    whole, part = (r[0]["memory_bytes"] for r in (one, two))
    for key in ("weights", "gradients", "optimizer_state"):
        assert 0.4 < part[key] / whole[key] < 0.7
