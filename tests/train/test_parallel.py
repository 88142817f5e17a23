"""Several processes train as one: the same batches, and losses equal to rounding."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

from steepest.errors import UserError
from steepest.train import RunConfig, Runtime, read_metrics, run
from steepest.train.parallel import check_batch

from .conftest import MakeConfig

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {"lr": 1e-2},
    "muon": {"lr": 2e-2, "options": {"adam_lr": 1e-2, "ns_dtype": "float32"}},
    # A large eps leaves little weight to the vectors that rounding chooses for SOAP where its
    # factors are singular.
    "soap": {"lr": 1e-2, "options": {"eps": 1e-2}},
    "galore_adamw": {"lr": 1e-2, "options": {"rank": 4}},
    "prodigy": {"lr": 1.0},
    "schedulefree_adamw": {"lr": 1e-2},
    "sophia_g": {"lr": 1e-3, "options": {"update_interval": 3}},
}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def one_process(rank: int, world: int, port: int, folder: str, configs: list[str]) -> None:
    """Do the runs as torchrun's process `rank` would."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo",
    )  # fmt: skip
    for config in configs:
        way, _, text = config.partition("\n")
        runtime = Runtime(
            threads=1, log_every=1, checkpoint_every=4, permanent_every=4, parallel=way
        )
        values = RunConfig.from_toml(Path(text))
        run(values, Path(folder) / way, runtime=runtime)


def losses(folder: Path, result: dict[str, Any]) -> list[float]:
    records = read_metrics(folder / str(result["hash"]) / "metrics.jsonl")
    return [record.get("loss", record.get("val_loss")) for record in records]


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_losses_do_not_depend_on_the_number_of_processes(
    world: int, make_config: MakeConfig, tmp_path: Path
) -> None:
    configs, alone = [], {}
    for name, settings in OPTIMIZERS.items():
        config = make_config(
            name=name, steps=8, gradient_accumulation=2, tokens=16 * 9, ema=(0.5,),
            **{"averaging.every": 2, "packing": "documents"}, **settings,
        )  # fmt: skip
        file = tmp_path / f"{name}.toml"
        file.write_text(config.to_toml())
        runtime = Runtime(threads=1, log_every=1, checkpoint_every=0)
        alone[name] = losses(tmp_path / "one", run(config, tmp_path / "one", runtime=runtime))
        sharded = name in ("adamw", "muon") or (world == 2 and name != "sophia_g")
        ways = ["fsdp", "ddp"] if sharded else ["ddp"]
        configs += [f"{way}\n{file}" for way in ways]
    mp.spawn(one_process, args=(world, free_port(), str(tmp_path), configs), nprocs=world)
    for config in configs:
        way, _, file = config.partition("\n")
        name = Path(file).stem
        (result,) = (
            found
            for path in (tmp_path / way).glob("*/result.json")
            if (found := json.loads(path.read_text()))["optimizer"] == name
        )
        together = losses(tmp_path / way, result)
        tolerance = 1e-3 if name == "soap" else 2e-4
        assert together == pytest.approx(alone[name], rel=tolerance), (name, way)


@pytest.mark.slow
def test_the_command_starts_processes_and_stops_when_asked(
    make_config: MakeConfig, tmp_path: Path, child_environment: dict[str, str]
) -> None:
    file = tmp_path / "run.toml"
    file.write_text(make_config(steps=6, every=3).to_toml())
    out = tmp_path / "runs"
    done = subprocess.run(
        [sys.executable, "-m", "steepest", "train", str(file), "--out", str(out),
         "--runtime.processes", "2", "--runtime.threads", "1"],
        env={**child_environment, "GLOO_SOCKET_IFNAME": "lo"},
        text=True, capture_output=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("finished") == 1
    (result,) = out.glob("*/result.json")
    expected = run(make_config(steps=6, every=3), tmp_path / "one", runtime=Runtime(threads=1))
    assert json.loads(result.read_text())["val_loss"] == pytest.approx(
        expected["val_loss"], rel=1e-5
    )


@pytest.mark.slow
def test_a_sharded_run_continues_to_the_same_bits(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(name="muon", steps=8, options={"adam_lr": 1e-2}, windows=(2,), every=4)
    file = tmp_path / "run.toml"
    file.write_text(config.to_toml())

    def train() -> tuple[Path, dict[str, Any]]:
        jobs = [f"fsdp\n{file}"]
        mp.spawn(one_process, args=(2, free_port(), str(tmp_path), jobs), nprocs=2)
        (result,) = (tmp_path / "fsdp").glob("*/result.json")
        (last,) = (tmp_path / "fsdp").glob("*/checkpoints/step-000000008.pt")
        found: dict[str, Any] = torch.load(last, weights_only=True)["learner"]
        last.unlink()
        result.unlink()
        return last, found

    last, whole = train()
    assert last.with_name("step-000000004.pt").exists()
    _, resumed = train()
    for key, value in whole["model"].items():
        assert torch.equal(value, resumed["model"][key]), key
    assert value.shape == torch.Size([300, 16])  # not a shard of it


def test_a_batch_that_processes_cannot_share_is_refused() -> None:
    check_batch(12, 4)
    with pytest.raises(UserError, match=r"data\.batch_size is 12, which 5 processes cannot share"):
        check_batch(12, 5)
