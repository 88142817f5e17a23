"""Doing a run: its data, its processes, its folder, and then the training in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch

from steepest import data
from steepest.errors import UserError
from steepest.train import optimizers, sinks
from steepest.train.config import RunConfig, Runtime, TrainingConfig
from steepest.train.folder import locate, opened
from steepest.train.group import meet, one_voice
from steepest.train.loop import Training
from steepest.train.parallel import Parallel, check_batch, join
from steepest.train.progress import Progress
from steepest.train.resolving import is_resolved, open_data, resolve
from steepest.train.stopping import Preempted, StopRequest

TOGETHER = ("parallel", "checkpoint_every", "log_every", "dynamics_every")
"""What of the runtime says when all processes have to do something together."""


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

    Where several processes were started together, each calls this, as torchrun's environment says
    which it is. The first one reads and writes the folder, which the others need not see; they need
    the data, under any path. Signals are left to the caller: see `StopRequest`.

    Raises UserError for input that cannot work, and if another process works on the run; Preempted
    where it stopped as asked. Of several processes the first that fails raises its error, and the
    others raise FailedElsewhere; the group is then of no more use.
    """
    runtime, stop = runtime or Runtime(), stop or StopRequest()
    store = meet()
    with one_voice(store):
        if store is None and (found := _complete(config, runs_dir)) is not None:
            return found
        parallel, device = join(store, runtime.parallel, find_device(runtime.device))
        _check_runtime(config, runtime, parallel, device)
        if (found := parallel.from_first(lambda: _complete(config, runs_dir))) is not None:
            return found
        tokens = parallel.once_per_machine(lambda: open_data(config.data))
        optimizers.check(config.optimizer, config.model)
        config = resolve(config, tokens, device)
        parallel.check_same(config.to_dict())
        _check_data(config, tokens)
        with opened(runs_dir, config, shared=parallel.rank > 0) as folder:
            if (found := parallel.from_first(folder.read_result)) is not None:
                return found
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
                with training.journal, closing(training.watch), training.feed:
                    return _finished(training, parallel, stop)


def _finished(training: Training, parallel: Parallel, stop: StopRequest) -> dict[str, Any]:
    """Train to the end; where the run is stopped, no process goes before the first has saved."""
    try:
        return training.finish(stop)
    except Preempted:
        stop.asked = True  # in all, whichever process was asked
        parallel.any(True)
        raise


def _complete(config: RunConfig, runs_dir: Path) -> dict[str, Any] | None:
    """Return the result of a run, if it has a hash and a result."""
    return locate(runs_dir, config).read_result() if is_resolved(config) else None


def _check_runtime(
    config: RunConfig, runtime: Runtime, parallel: Parallel, device: torch.device
) -> None:
    """Raise UserError for what cannot work with this number of processes, or here."""
    if parallel.world_size > 1 and ":" in runtime.device:
        raise UserError(
            f"runtime.device is {runtime.device}, but several processes have a GPU each; say cuda."
        )
    shared = {name: getattr(runtime, name) for name in TOGETHER} | {"device": device.type}
    versions = {"torch": torch.__version__}
    parallel.check_same({**config.to_dict(), "runtime": shared, "versions": versions})
    check_batch(config.data.batch_size, parallel.world_size)
    if parallel.rank == 0:
        sinks.check(runtime.sinks)


def device_called(name: str) -> torch.device:
    """Return the device called `name`, whether it is there or not; raise UserError for no name."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"Unknown device {name!r}; use cpu, cuda or cuda:N.") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"The device {name!r} is not supported; use cpu, cuda or cuda:N.")
    return device


def find_device(name: str) -> torch.device:
    """Return the device called `name`; raise UserError if there is none that can be used."""
    device = device_called(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"The device {name!r} was asked for, but torch finds no CUDA device.")
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _check_data(config: RunConfig, tokens: data.TokenData) -> None:
    """Raise UserError unless both splits have rows enough, before the run has a folder."""
    length, packing = config.data.sequence_length, config.data.as_packing()
    data.Loader(tokens.train, config.data.batch_size, length, config.training.seed, packing)
    data.validation_batches(
        tokens.validation,
        batch_size=1,
        sequence_length=length,
        max_tokens=config.evaluation.tokens,
        packing=packing,
    )


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
