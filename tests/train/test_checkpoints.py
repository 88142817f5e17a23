"""Which checkpoints stay, and which are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from steepest.errors import UserError
from steepest.train import Runtime, checkpoints, run

from .conftest import MakeConfig


def steps_in(folder: Path) -> list[int]:
    return sorted(int(path.stem.removeprefix("step-")) for path in folder.glob("*.pt"))


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


@pytest.mark.parametrize(
    ("runtime", "expected"),
    [
        ({"keep_checkpoints": 3}, [30]),
        ({"permanent_every": 12}, [12, 24, 30]),
        ({"checkpoint_every": 0, "permanent_every": 12}, []),
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


def test_no_code_is_run_from_a_checkpoint(tmp_path: Path) -> None:
    path = checkpoints.path_of(tmp_path, 1)
    torch.save({**state(1), "danger": Path("x")}, path)
    with pytest.raises(UserError, match="could not be read"):
        checkpoints.load(path)
