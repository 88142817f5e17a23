"""FSDP2: parameters sharded over processes take the steps that one process would."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from sharding import JOBS, MIDDLE, MODELS, STEPS, UNDETERMINED, Fused, load, process, train, whole
from torch import Tensor, nn

import steepest

# One worker, so that the processes are started once.
pytestmark = pytest.mark.slow

Found = tuple[Path, dict[str, Any]]


@pytest.fixture(scope="module")
def of_processes(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Found]:
    """Return the folder of a number of processes and what they found: one start for all tests."""

    @functools.cache
    def start(world: int) -> Found:
        folder: Path = tmp_path_factory.mktemp("fsdp")
        module, optimizer = begun("muon fused")
        torch.save([module.state_dict(), optimizer.state_dict()], folder / "alone.pt")
        mp.spawn(process, args=(world, str(folder)), nprocs=world)
        return folder, torch.load(folder / "found.pt", weights_only=True)

    return start


def begun(label: str) -> tuple[nn.Module, steepest.Optimizer]:
    """Return a model and its optimizer half-way, in this process alone."""
    job = JOBS[label]
    module = MODELS[job.model]()
    optimizer = job.make(module)
    train(module, optimizer, range(MIDDLE))
    return module, optimizer


def moved_alike(ours: list[Tensor], theirs: list[Tensor], start: list[Tensor]) -> None:
    for a, b, p0 in zip(ours, theirs, start, strict=True):
        # Adam magnifies rounding where a gradient is near zero, so not all of 1e-6 at each element.
        assert (a - b).norm() <= 1e-4 * (b - p0).norm()
        torch.testing.assert_close(a, b, rtol=1e-6, atol=4e-6)


def cases(labels: Iterable[str]) -> Any:
    """Return a parametrization over jobs and their numbers of processes."""
    pairs = [(label, world) for label in labels for world in JOBS[label].worlds]
    ids = [f"{label}, {world} processes" for label, world in pairs]
    return pytest.mark.parametrize(("label", "world"), pairs, ids=ids)


@cases(label for label in JOBS if label not in UNDETERMINED)
def test_processes_are_one(label: str, world: int, of_processes: Callable[[int], Found]) -> None:
    found = of_processes(world)[1][label]
    start = whole(MODELS[JOBS[label].model]())
    module, optimizer = begun(label)
    train(module, optimizer, range(MIDDLE, STEPS))
    moved_alike(found["trained"], whole(module), start)
    optimizer.eval()
    moved_alike(found["evaluated"], whole(module), start)


@cases(label for label, job in JOBS.items() if job.way is not None)
def test_a_checkpoint_continues_to_the_bit(
    label: str, world: int, of_processes: Callable[[int], Found]
) -> None:
    found = of_processes(world)[1][label]
    for resumed, trained in zip(found["resumed"], found["trained"], strict=True):
        assert torch.equal(resumed, trained)


@pytest.mark.parametrize("world", [2, 4])
def test_a_checkpoint_of_one_process_continues_in_many(
    world: int, of_processes: Callable[[int], Found]
) -> None:
    found = of_processes(world)[1]
    moved_alike(found["spread"]["trained"], found["muon fused"]["trained"], whole(Fused()))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("world", [2, 4])
def test_a_checkpoint_of_many_processes_continues_in_one(
    world: int, of_processes: Callable[[int], Found]
) -> None:
    folder, found = of_processes(world)
    module = Fused()
    optimizer = JOBS["muon fused"].make(module)
    load("dcp", module, optimizer, str(folder / "muon fused"))
    train(module, optimizer, range(MIDDLE, STEPS))
    moved_alike(whole(module), found["muon fused"]["trained"], whole(Fused()))


@pytest.mark.parametrize("world", [2, 4])
def test_what_is_not_finite_in_one_shard_skips_the_step_of_all(
    world: int, of_processes: Callable[[int], Found]
) -> None:
    found = of_processes(world)[1]["refused"]
    assert found["skipped"] == 1
    for before, after in zip(found["before"], found["after"], strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("world", [2, 4])
def test_matrices_of_one_shape_are_gathered_together(
    world: int, of_processes: Callable[[int], Found]
) -> None:
    counts = of_processes(world)[1]["counts"]
    assert counts["exchanges"] == 2 * counts["shapes"]  # gradients, and parameters
