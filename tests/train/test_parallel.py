"""Several processes train as one: the same batches, and losses equal to rounding."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from steepest.errors import UserError
from steepest.train import FailedElsewhere, RunConfig, Runtime, checkpoints, read_metrics, run
from steepest.train.parallel import check_batch, join, own_gpu

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
    # Its momentum is in the gradients, whose memory is DDP's.
    "scion_light": {"lr": 1e-4, "options": {"ns_dtype": "float32"}},
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


def numbers(folder: Path, result: dict[str, Any]) -> tuple[list[float], list[float]]:
    """Return losses, those of averaged weights too, and norms of gradients, in order."""
    found, norms = [], []
    for record in read_metrics(folder / str(result["hash"]) / "metrics.jsonl"):
        found += [record[name] for name in ("loss", "val_loss") if name in record]
        found += record.get("averaged", {}).values()
        norms += [record["grad_norm"]] if "grad_norm" in record else []
    return found, norms


def newest(folder: Path) -> Path:
    """Return the file of the newest checkpoint of a run."""
    found = checkpoints.newest(folder / "checkpoints")
    assert found is not None
    return found


def steps_begun(folder: Path) -> list[int]:
    """Return the steps that the sessions of a run began after."""
    environment = json.loads((folder / "environment.json").read_text())
    return [session["step"] for session in environment["sessions"]]


@pytest.fixture
def short_documents(corpus: Path, tmp_path: Path) -> Path:
    """Return a corpus whose documents are so short that rows have unequal numbers of targets."""
    rng, words, documents = random.Random(0), corpus.read_text().split(), []
    while words:
        count = rng.randint(1, 12)
        documents.append(" ".join(words[:count]))
        words = words[count:]
    path = tmp_path / "short.txt"
    path.write_text("\f".join(documents))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_losses_do_not_depend_on_the_number_of_processes(
    world: int, make_config: MakeConfig, short_documents: Path, tmp_path: Path
) -> None:
    configs, alone = [], {}
    for name, settings in OPTIMIZERS.items():
        config = make_config(
            name=name, corpus=str(short_documents), steps=8, gradient_accumulation=2,
            tokens=16 * 9, ema=(0.5,),
            **{"evaluation.every": 3, "averaging.every": 2, "packing": "documents"}, **settings,
        )  # fmt: skip
        file = tmp_path / f"{name}.toml"
        file.write_text(config.to_toml())
        runtime = Runtime(threads=1, log_every=1, checkpoint_every=0)
        alone[name] = numbers(tmp_path / "one", run(config, tmp_path / "one", runtime=runtime))
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
        for measured, expected, of_soap in zip(
            numbers(tmp_path / way, result), alone[name], (1e-3, 5e-2), strict=True
        ):
            tolerance = of_soap if name == "soap" else 2e-4
            assert measured == pytest.approx(expected, rel=tolerance), (name, way)


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
    config = make_config(
        name="muon", steps=8, options={"adam_lr": 1e-2}, windows=(2,),
        **{"evaluation.every": 4, "averaging.every": 2},
    )  # fmt: skip
    file = tmp_path / "run.toml"
    file.write_text(config.to_toml())

    def train() -> tuple[Path, dict[str, Any]]:
        jobs = [f"fsdp\n{file}"]
        mp.spawn(one_process, args=(2, free_port(), str(tmp_path), jobs), nprocs=2)
        (result,) = (tmp_path / "fsdp").glob("*/result.json")
        last = newest(result.parent)
        state = checkpoints.load(last)
        assert state["step"] == 8
        last.unlink()
        result.unlink()
        before = checkpoints.load(newest(result.parent))["step"]
        assert before == 4
        found: dict[str, Any] = state["learner"]
        return result.parent, found

    folder, whole = train()
    _, resumed = train()
    assert steps_begun(folder) == [0, 4]
    for key, value in whole["model"].items():
        assert torch.equal(value, resumed["model"][key]), key
    assert value.shape == torch.Size([300, 16])  # not a shard of it


def machines(
    starter: str, way: str, file: Path, outs: tuple[Path, Path], environment: dict[str, str]
) -> None:
    """Do a run on two machines, as far as one can be two: started apart, with a cache each."""
    port, both = free_port(), []
    for rank, out in enumerate(outs):
        train = [
            "-m", "steepest", "train", str(file), "--out", str(out), "--runtime.parallel", way,
            "--runtime.threads", "1", "--runtime.log-every", "1",
            "--runtime.checkpoint-every", "4", "--runtime.permanent-every", "4",
        ]  # fmt: skip
        if starter == "torchrun":
            agent = [
                "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1",
                "--node-rank", str(rank), "--master-addr", "127.0.0.1", "--master-port", str(port),
            ]  # fmt: skip
            train = agent + train
        else:
            train += [
                "--runtime.nodes", "2", "--runtime.node-rank", str(rank),
                "--runtime.rendezvous", f"127.0.0.1:{port}",
            ]  # fmt: skip
        command = [sys.executable, *train]
        env = {**environment, "STEEPEST_CACHE": f"{file}-{rank}", "GLOO_SOCKET_IFNAME": "lo"}
        pipe = subprocess.PIPE
        both.append(subprocess.Popen(command, env=env, text=True, stdout=pipe, stderr=pipe))
    said = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert [output.count("finished") for output, _ in said] == [1, 0]


@pytest.mark.slow
@pytest.mark.parametrize(("starter", "way"), [("torchrun", "fsdp"), ("steepest", "ddp")])
def test_machines_need_not_see_each_others_files(
    starter: str,
    way: str,
    make_config: MakeConfig,
    tmp_path: Path,
    child_environment: dict[str, str],
) -> None:
    config = make_config(
        name="muon", steps=8, options={"adam_lr": 1e-2}, ema=(0.5,),
        **{"evaluation.every": 4, "averaging.every": 2},
    )  # fmt: skip
    file, outs = tmp_path / "run.toml", (tmp_path / "first", tmp_path / "second")
    file.write_text(config.to_toml())
    machines(starter, way, file, outs, child_environment)
    assert not outs[1].exists()
    (result,) = outs[0].glob("*/result.json")
    alone = run(config, tmp_path / "one", runtime=Runtime(threads=1, log_every=1))
    together = losses(outs[0], alone)
    assert together == pytest.approx(losses(tmp_path / "one", alone), rel=1e-5)
    last = newest(result.parent)
    whole = checkpoints.load(last)
    last.unlink()
    result.unlink()
    machines(starter, way, file, outs, child_environment)
    assert steps_begun(result.parent) == [0, 4]  # which the first one has
    resumed = checkpoints.load(newest(result.parent))
    assert resumed["step"] == whole["step"] == 8
    assert losses(outs[0], alone) == together
    for key, value in whole["learner"]["model"].items():
        assert torch.equal(value, resumed["learner"]["model"][key]), key


def outcome(rank: int, port: int, folder: str, files: list[str]) -> None:
    """Do a run with the config of one's own rank, and write how it ends."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME="lo")
    try:
        config = RunConfig.from_toml(Path(files[rank]))
        run(config, Path(folder), runtime=Runtime(threads=1, log_every=1 + rank))
    except (UserError, FailedElsewhere) as error:
        Path(folder, f"{rank}.txt").write_text(f"{type(error).__name__} {error}")


def test_processes_with_other_configs_are_refused_by_one_of_them(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    files = [str(tmp_path / "0.toml"), str(tmp_path / "1.toml")]
    for file, seed in zip(files, (3, 4), strict=True):
        Path(file).write_text(make_config(name="adamw", steps=8, seed=seed).to_toml())
    mp.start_processes(
        outcome, args=(free_port(), str(tmp_path), files), nprocs=2, start_method="fork"
    )
    both = [(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)]
    told, first = sorted(both), int(both[1].startswith("UserError"))
    sentence = (
        "All processes of a run must have one config, but runtime.log_every is 1 in process 0 and "
        "2 in process 1, training.seed is 3 in process 0 and 4 in process 1."
    )
    assert told == [
        f"FailedElsewhere process {1 - first} failed as another one of the run did: {sentence}",
        f"UserError {sentence}",
    ]
    assert not list(tmp_path.glob("*/config.toml"))


def exchange(rank: int, port: int, folder: str) -> None:
    """Take a value from process 0, and find which process prepares first."""
    store = dist.TCPStore("127.0.0.1", port, 2, is_master=rank == 0)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", GLOO_SOCKET_IFNAME="lo")
    parallel, _ = join(store, "ddp", torch.device("cpu"))
    torch.save(parallel.from_first(lambda: value_of(rank)), Path(folder, f"{rank}.pt"))
    order = Path(folder, "order")
    parallel.once_per_machine(lambda: order.open("a").write(str(rank)))
    assert parallel.any(rank == 1)
    assert not parallel.any(False)


def value_of(rank: int) -> dict[str, Any]:
    assert rank == 0
    tensors = [
        torch.arange(6.0).reshape(2, 3).T,
        torch.tensor(2.5, dtype=torch.float64),
        torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
        torch.tensor([[True], [False]]),
        torch.arange(256, dtype=torch.uint8),
        torch.empty(0, 4),
    ]
    return {"step": 7, 0: tensors, "none": None, "twice": [tensors[0], tensors[0]]}


def test_a_value_of_the_first_process_reaches_all(tmp_path: Path) -> None:
    mp.start_processes(exchange, args=(free_port(), str(tmp_path)), nprocs=2, start_method="fork")
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    expected = value_of(0)
    for found in (first, second):
        assert found.keys() == expected.keys()
        assert found["step"] == 7
        for tensor, wanted in zip(found[0], expected[0], strict=True):
            assert tensor.dtype == wanted.dtype
            assert torch.equal(tensor, wanted)
        assert all(torch.equal(tensor, expected[0][0]) for tensor in found["twice"])
    assert (tmp_path / "order").read_text() == "01"


GPUS: dict[str, Any] = {
    "by local rank": ("2", 4, None, 2),
    "one shown by the scheduler": ("2", 1, "GPU-0a1b", 0),
    "all shown": ("1", 2, "4,5", 1),
}


@pytest.mark.parametrize("case", GPUS)
def test_every_process_has_its_own_gpu(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    local, count, visible, expected = GPUS[case]
    monkeypatch.setenv("LOCAL_RANK", local)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    assert own_gpu() == torch.device("cuda", expected)


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="more processes on this machine than its 2 GPUs"):
        own_gpu()


def test_too_little_data_are_refused_before_there_is_a_folder(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    with pytest.raises(UserError, match="a batch needs 4000"):
        run(make_config(name="adamw", batch_size=4000), runs, runtime=Runtime(threads=1))
    with pytest.raises(UserError, match="at most 512 tokens leaves no sequence of 2000"):
        run(make_config(name="adamw", sequence_length=2000, batch_size=1), runs)
    assert not runs.exists()


def test_a_batch_that_processes_cannot_share_is_refused() -> None:
    check_batch(12, 4)
    with pytest.raises(UserError, match=r"data\.batch_size is 12, which 5 processes cannot share"):
        check_batch(12, 5)
