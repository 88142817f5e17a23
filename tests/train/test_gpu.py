"""Runs on GPUs. The same tests run on the CPU, where they show that they are not broken."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

from steepest.train import RunConfig, Runtime, checkpoints, run
from steepest.train.peaks import peak_of

from .conftest import MakeConfig
from .killed_runs import flatten
from .test_parallel import free_port, numbers, steps_begun

EVERY = 5
MUON = {"lr": 2e-2, "options": {"adam_lr": 1e-2, "ns_dtype": "float32"}}
CRASH = """
import sys
from pathlib import Path
from crash import set_trap
from steepest.train import RunConfig, Runtime, run

file, runs, device, step = sys.argv[1:]
set_trap("record", int(step))
runtime = Runtime(device=device, threads=1, checkpoint_every=5, log_every=1)
run(RunConfig.from_toml(Path(file)), Path(runs), runtime=runtime)
"""


@pytest.fixture(
    params=[
        pytest.param("cuda", marks=pytest.mark.gpu),
        pytest.param("cpu", marks=pytest.mark.slow),
    ]
)
def device(request: pytest.FixtureRequest) -> str:
    """A kind of device."""
    kind = str(request.param)
    if kind == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return kind


def runtime(device: str, **values: Any) -> Runtime:
    return Runtime(device=device, threads=1, checkpoint_every=EVERY, log_every=1, **values)


def test_a_result_has_what_a_gpu_is_bought_for(
    device: str, make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config(
        name="adamw", steps=12, hidden_size=128, sequence_length=128, batch_size=16
    )
    began = time.monotonic()
    result = run(config, tmp_path, runtime=runtime(device))
    wall = time.monotonic() - began
    on_gpu = device == "cuda"
    assert result["config"]["training"]["precision"] == ("bfloat16" if on_gpu else "float32")
    assert result["val_loss"] < result["initial_val_loss"]
    known = on_gpu and peak_of(torch.cuda.get_device_name()) is not None
    assert (result["mfu"] is not None) == known
    assert not known or 0 < result["mfu"] < 1
    held = {k: v for k, v in result["memory_bytes"].items() if k != "peak"}
    assert result["memory_bytes"]["peak"] >= sum(held.values()) > 0
    assert ("activations" in held) == on_gpu
    seconds = dict(result["part_seconds"])
    between = seconds.pop("evaluation") + seconds.pop("checkpoint")
    assert min(seconds.values()) >= 0
    assert sum(seconds.values()) == pytest.approx(result["seconds"], rel=0.1)
    assert 0 < result["seconds"] + between < wall


def state_of(folder: Path) -> dict[str, object]:
    """Return all bits that a run ended with."""
    newest = checkpoints.newest(folder / "checkpoints")
    assert newest is not None
    found: dict[str, object] = {}
    state = checkpoints.load(newest)
    flatten({key: state[key] for key in state if key != "clock"}, "", found)
    return found


def test_a_killed_run_continues_to_the_same_bits(
    device: str, make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config(
        name="muon", steps=12, gradient_accumulation=2, **MUON
    )  # AdamW's rule is in it
    file, cut = tmp_path / "run.toml", tmp_path / "cut"
    file.write_text(config.to_toml())
    whole = run(config, tmp_path / "whole", runtime=runtime(device))
    here = str(Path(__file__).parent)
    killed = subprocess.run(
        [sys.executable, "-c", CRASH, str(file), str(cut), device, "8"],
        env={**os.environ, "PYTHONPATH": here}, timeout=300, check=False,
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL
    continued = run(config, cut, runtime=runtime(device))
    folders = [tmp_path / "whole" / whole["hash"], cut / whole["hash"]]
    assert steps_begun(folders[1]) == [0, EVERY]
    assert continued["val_loss"] == whole["val_loss"]
    states = [state_of(folder) for folder in folders]
    assert states[0].keys() == states[1].keys()
    assert [key for key in states[0] if states[0][key] != states[1][key]] == []


def one_of_two(rank: int, port: int, file: str, folder: str, device: str) -> None:
    """Do a run both ways as process `rank` of two."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo",
    )  # fmt: skip
    for way in ("ddp", "fsdp"):
        how = runtime(device, parallel=way)
        run(RunConfig.from_toml(Path(file)), Path(folder) / way, runtime=how)


def test_two_processes_train_as_one(device: str, make_config: MakeConfig, tmp_path: Path) -> None:
    if device == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    config = make_config(name="muon", steps=8, gradient_accumulation=2, precision="float32", **MUON)
    file = tmp_path / "run.toml"
    file.write_text(config.to_toml())
    alone = run(config, tmp_path / "one", runtime=runtime(device))
    mp.spawn(one_of_two, args=(free_port(), str(file), str(tmp_path), device), nprocs=2)
    expected = numbers(tmp_path / "one", alone)
    for way in ("ddp", "fsdp"):
        (result,) = (tmp_path / way).glob("*/result.json")
        found = numbers(tmp_path / way, json.loads(result.read_text()))
        for measured, wanted in zip(found, expected, strict=True):
            assert measured == pytest.approx(wanted, rel=1e-3), way


def test_a_compiled_run_has_the_losses_of_an_eager_one(
    device: str, make_config: MakeConfig, tmp_path: Path
) -> None:
    if device == "cpu" and shutil.which("c++") is None:
        pytest.skip("needs a C++ compiler")
    found = []
    for compiled in (False, True):
        config = make_config(name="adamw", steps=8, precision="float32", compile=compiled)
        result = run(config, tmp_path, runtime=runtime(device))
        assert result["warnings"] == []
        found.append(numbers(tmp_path, result))
    for eager, compiled_ones in zip(*found, strict=True):
        assert compiled_ones == pytest.approx(eager, rel=1e-3)
