"""Doing a run: its data, its processes, its folder, and then the training in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from steepest.errors import UserError
from steepest.train import optimizers, sinks
from steepest.train.config import RunConfig, Runtime, TrainingConfig
from steepest.train.folder import locate, opened
from steepest.train.loop import Training
from steepest.train.parallel import check_batch, join
from steepest.train.progress import Progress
from steepest.train.resolving import is_resolved, open_data, resolve
from steepest.train.stopping import StopRequest


def run(
    config: RunConfig,
    runs_dir: Path,
    *,
    runtime: Runtime | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    stop: StopRequest | None = None,
) -> dict[str, Any]:
    """Train as `config` says in `runs_dir/<hash>`, and return the content of its result.json.

    A complete run is returned at once; one that was killed continues from its last checkpoint and
    ends with the same bits as one that was not. A run that diverges ends early, with status
    "diverged". `on_progress` is called at most every quarter of a second, and at the end.

    Under torchrun every process calls this; the first one writes. Once `stop` is asked for, the run
    saves its state after the step at hand.

    Raises UserError for input that cannot work, and if another process works on the run; Preempted
    where it stopped as asked.
    """
    runtime = runtime or Runtime()
    if is_resolved(config) and (result := locate(runs_dir, config).read_result()) is not None:
        return result
    device = find_device(runtime.device)
    sinks.check(runtime.sinks)
    tokens = open_data(config.data)
    optimizers.check(config.optimizer, config.model)
    config = resolve(config, tokens, device)
    parallel, device = join(runtime.parallel, device)
    check_batch(config.data.batch_size, parallel.world_size)
    with opened(runs_dir, config, shared=parallel.rank > 0) as folder:
        if (result := folder.read_result()) is not None:
            return result
        with own_torch_state(config.training, device, runtime.threads):
            training = Training(
                config,
                tokens,
                folder,
                device=device,
                runtime=runtime,
                parallel=parallel,
                on_progress=on_progress,
            )
            with training.sinks, training.feed:
                return training.finish(stop or StopRequest())


def find_device(name: str) -> torch.device:
    """Return the device called `name`; raise UserError if there is none that can be used."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"Unknown device {name!r}; use cpu, cuda or cuda:N.") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"The device {name!r} was asked for, but torch finds no CUDA device.")
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"The device {name!r} is not supported; use cpu, cuda or cuda:N.")
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


@contextmanager
def own_torch_state(
    config: TrainingConfig, device: torch.device, threads: int | None
) -> Iterator[None]:
    """Give the run torch's generators, seeded, its threads and its TF32 choice; undo it after."""
    threads_before = torch.get_num_threads()
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    tf32_before = products.allow_tf32, convolutions.allow_tf32
    gpus = [device.index] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=gpus):
        torch.manual_seed(config.seed)
        torch.set_num_threads(threads or threads_before)
        products.allow_tf32 = convolutions.allow_tf32 = config.tf32
        try:
            yield
        finally:
            torch.set_num_threads(threads_before)
            products.allow_tf32, convolutions.allow_tf32 = tf32_before
