"""Which checkpoints stay, and which are read."""

from __future__ import annotations

import copy
import os
import pickle
import random
import resource
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from steepest.errors import UserError
from steepest.train import Runtime, checkpoints, run

from .conftest import MakeConfig


def steps_in(folder: Path) -> list[int]:
    return sorted(int(path.name[5:14]) for path in folder.glob("*.pt"))


def state(step: int, **more: Any) -> dict[str, Any]:
    return {"schema": checkpoints.SCHEMA, "step": step, **more}


@pytest.mark.parametrize(
    ("keep", "permanent", "expected"),
    [(1, 0, [24]), (3, 0, [20, 22, 24]), (2, 8, [8, 16, 22, 24]), (1, 2, list(range(2, 25, 2)))],
)
def test_the_last_ones_and_permanent_ones_stay(
    keep: int, permanent: int, expected: list[int], tmp_path: Path
) -> None:
    for step in range(2, 25, 2):
        checkpoints.save(tmp_path, step, state(step), keep, permanent)
    assert steps_in(tmp_path) == expected


def test_permanent_ones_outlive_a_process_that_was_not_told_of_them(tmp_path: Path) -> None:
    for step in range(2, 13, 2):
        checkpoints.save(tmp_path, step, state(step), keep=3, permanent_every=4)
    assert steps_in(tmp_path) == [4, 8, 10, 12]
    for step, keep in [(14, 2), (16, 1), (18, 1)]:
        checkpoints.save(tmp_path, step, state(step), keep=keep)
    assert steps_in(tmp_path) == [4, 8, 12, 18]
    found, _ = checkpoints.load_newest(tmp_path)
    assert found is not None
    assert found["step"] == 18


@pytest.mark.parametrize("keep", [1, 2])
def test_damaged_ones_take_no_place_of_others(keep: int, tmp_path: Path) -> None:
    for step in (21, 28):
        checkpoints.save(tmp_path, step, state(step))
    checkpoints.path_of(tmp_path, 28).write_bytes(b"torn")
    for step in (23, 25, 27):
        checkpoints.save(tmp_path, step, state(step), keep)
        found, warnings = checkpoints.load_newest(tmp_path)
        assert found is not None
        assert (found["step"], warnings) == (step, [])
    assert steps_in(tmp_path) == [27, 25][:keep][::-1]


def test_a_new_one_is_on_the_disk_before_an_old_one_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints.save(tmp_path, 1, state(1), keep=1)
    done: list[str] = []

    def noting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(place: Any, *others: Any, **more: Any) -> Any:
            path = Path(os.readlink(f"/proc/self/fd/{place}") if isinstance(place, int) else place)
            done.append(f"{name} {'new' if path.name.startswith('.') else path.name}")
            return function(place, *others, **more)

        return call

    monkeypatch.setattr(os, "fsync", noting("fsync", os.fsync))
    monkeypatch.setattr(Path, "replace", noting("replace", Path.replace))
    monkeypatch.setattr(Path, "unlink", noting("unlink", Path.unlink))
    checkpoints.save(tmp_path, 2, state(2), keep=1)
    assert done == [
        "fsync new",
        "replace new",
        f"fsync {tmp_path.name}",
        "unlink new",  # which is not there any more
        "unlink step-000000001.pt",
    ]


@pytest.mark.parametrize(
    ("runtime", "expected"),
    [
        ({"keep_checkpoints": 3}, [30]),
        ({"permanent_every": 12}, [12, 24, 30]),
        ({"checkpoint_every": 0}, []),
    ],
)
def test_a_run_leaves_its_last_and_its_permanent_checkpoints(
    runtime: dict[str, int], expected: list[int], make_config: MakeConfig, tmp_path: Path
) -> None:
    done = Runtime(**{"threads": 1, "checkpoint_every": 4, **runtime})
    result = run(make_config(), tmp_path, runtime=done)
    assert steps_in(tmp_path / result["hash"] / "checkpoints") == expected


def test_damaged_ones_are_passed_over_and_told(tmp_path: Path) -> None:
    for step in (3, 6, 9):
        checkpoints.save(tmp_path, step, state(step, weights=torch.ones(99)), keep=3)
    newest, second = (checkpoints.path_of(tmp_path, step) for step in (9, 6))
    newest.write_bytes(newest.read_bytes()[:-20])
    content = bytearray(second.read_bytes())
    content[content.index(torch.ones(4).numpy().tobytes())] ^= 1
    second.write_bytes(content)
    found, warnings = checkpoints.load_newest(tmp_path)
    assert found is not None
    assert found["step"] == 3
    assert [sentence.split(" could")[0] for sentence in warnings] == [
        "The checkpoint step-000000009.pt",
        "The checkpoint step-000000006.pt",
    ]
    assert checkpoints.load_newest(tmp_path / "empty") == (None, [])


def plain(value: Any) -> Any:
    """Return a state with tensors as bytes."""
    if isinstance(value, torch.Tensor):
        return value.view(torch.uint8).numpy().tobytes()
    return {k: plain(v) for k, v in value.items()} if isinstance(value, dict) else value


def test_no_single_bit_changes_a_state_unnoticed(tmp_path: Path) -> None:
    saved = state(3, weights=torch.arange(40.0), more={"a": torch.ones(7, dtype=torch.bfloat16)})
    checkpoints.save(tmp_path, 2, state(2), keep=2)
    checkpoints.save(tmp_path, 3, copy.deepcopy(saved), keep=2)
    path = checkpoints.path_of(tmp_path, 3)
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        attributes = [whole.rindex(i.filename.encode()) - 46 + 38 for i in archive.infolist()]
    bits = [8 * place + 4 for place in attributes]  # make a folder of an entry
    bits += random.Random(0).sample(range(8 * len(whole)), 1500)
    steps = set()
    for bit in bits:
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        found, warnings = checkpoints.load_newest(tmp_path)
        assert found is not None
        assert plain(found) == plain(saved) if found["step"] == 3 else len(warnings) == 1, bit
        steps.add(found["step"])
    assert steps == {2, 3}  # bits between the parts of the file mean nothing


@pytest.mark.parametrize("length", [0, 1, 500, -1])
def test_no_torn_one_is_read(length: int, tmp_path: Path) -> None:
    for step in (2, 3):
        checkpoints.save(tmp_path, step, state(step, weights=torch.ones(99)))
    path = checkpoints.path_of(tmp_path, 3)
    path.write_bytes(path.read_bytes()[:length])
    found, warnings = checkpoints.load_newest(tmp_path)
    assert found is not None
    assert found["step"] == 2
    assert "step-000000003.pt could not be read" in warnings[0]


MEMORY = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes")
"""What torch raises on a CPU."""


@pytest.mark.parametrize(
    ("broken", "error", "sentence"),
    [
        (
            (zipfile, "ZipFile"),
            PermissionError(13, "Permission denied"),
            "could not be read .*Perm",
        ),
        (
            (torch, "load"),
            OSError(5, "Input/output error"),
            "could not be read .*Input/output error",
        ),
        ((torch, "load"), MEMORY, "could not be read .*allocate memory"),
        (
            (os, "listdir"),
            PermissionError(13, "Permission denied"),
            "could not be read: Permission",
        ),
    ],
)
def test_what_this_machine_cannot_read_is_not_passed_over(
    broken: tuple[Any, str],
    error: Exception,
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for step in (2, 3):
        checkpoints.save(tmp_path, step, state(step))

    def refuse(*given: Any, **more: Any) -> Any:
        raise error

    monkeypatch.setattr(*broken, refuse)
    with pytest.raises(UserError, match=sentence):
        checkpoints.load_newest(tmp_path)


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    others = ["step-best.pt", "step-000000009 (copy).pt", "step-9.pt", "notes.txt"]
    for name in others:
        (tmp_path / name).write_text("mine")
    for step in (2, 999_999_999, 1_000_000_000):
        checkpoints.save(tmp_path, step, state(step), keep=1)
    found, warnings = checkpoints.load_newest(tmp_path)
    assert found is not None
    assert (found["step"], warnings) == (1_000_000_000, [])
    assert sorted(os.listdir(tmp_path)) == sorted([*others, "step-1000000000.pt"])


def test_a_full_disk_is_a_sentence_and_keeps_the_one_before(tmp_path: Path) -> None:
    checkpoints.save(tmp_path, 1, state(1))
    size = checkpoints.path_of(tmp_path, 1).stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    big = state(2, weights=[torch.ones(999), torch.ones(10)])
    for limit in (1, 700, size, 4_000, 5_000):
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
            with pytest.raises(UserError, match="cannot be written to: the file would be larger"):
                checkpoints.save(tmp_path, 2, big, keep=1)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert os.listdir(tmp_path) == ["step-000000001.pt"]
    checkpoints.save(tmp_path, 2, big, keep=1)
    assert checkpoints.load_newest(tmp_path)[1] == []


def test_a_folder_that_was_moved_is_not_made_again(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is gone; the folder of a run cannot be moved"):
        checkpoints.save(tmp_path / "moved", 1, state(1))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("schema", [1, 99, None])
def test_another_schema_is_a_sentence_not_damage(
    schema: int | None, make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config(steps=6)
    result = run(config, tmp_path, runtime=Runtime(threads=1, checkpoint_every=3))
    folder = tmp_path / result["hash"]
    (folder / "result.json").unlink()
    path = checkpoints.path_of(folder / "checkpoints", 6)
    old = torch.load(path, weights_only=True)
    old.pop("spikes")
    torch.save({**old, "schema": schema}, path)
    sentence = f"has schema {schema}, and this version of steepest reads schema"
    with pytest.raises(UserError, match=sentence):
        run(config, tmp_path, runtime=Runtime(threads=1))
    with pytest.raises(UserError, match=sentence):
        checkpoints.load(path)
    assert path.exists()


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    torch.save(torch.ones(3), checkpoints.path_of(tmp_path, 9))
    with pytest.raises(UserError, match="has schema None"):
        checkpoints.load_newest(tmp_path)


class Malice:
    """What makes a folder when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


def test_no_code_is_run_from_a_checkpoint(tmp_path: Path) -> None:
    checkpoints.save(tmp_path, 1, state(1))
    path, trace = checkpoints.path_of(tmp_path, 2), tmp_path / "trace"
    bad = {**state(2), "danger": Malice(trace)}
    for write in (lambda: torch.save(bad, path), lambda: path.write_bytes(pickle.dumps(bad))):
        write()
        with pytest.raises(UserError, match="could not be read"):
            checkpoints.load(path)
        found, warnings = checkpoints.load_newest(tmp_path)
        assert found is not None
        assert (found["step"], len(warnings)) == (1, 1)
        assert not trace.exists()
