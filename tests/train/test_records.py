"""Lines of metrics.jsonl: which are read, which are dropped, what a full disk does."""

from __future__ import annotations

import json
import os
import resource
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from steepest.errors import UserError
from steepest.train import read_metrics
from steepest.train.records import MetricsWriter, read_json, truncate_metrics, write_json


def line(step: int, **more: object) -> str:
    return json.dumps({"kind": "train", "step": step, **more}) + "\n"


def steps(path: Path) -> list[int]:
    return [record["step"] for record in read_metrics(path)]


@pytest.mark.parametrize(("step", "expected"), [(-1, []), (0, [0]), (2, [0, 1, 2, 2]), (9, None)])
def test_truncation_drops_later_records_and_a_torn_line(
    step: int, expected: list[int] | None, tmp_path: Path
) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = [line(s) for s in (0, 1, 2, 2, 3, 4)]
    path.write_text("".join(whole) + '{"kind": "train", "st')
    assert truncate_metrics(path, step) == []
    kept = [0, 1, 2, 2, 3, 4] if expected is None else expected
    assert path.read_text() == "".join(whole[: len(kept)])
    assert steps(path) == kept
    assert truncate_metrics(tmp_path / "absent.jsonl", step) == []


@pytest.mark.parametrize("damage", ["\0\0\0\0\n", "3\n", "{}\n", '{"kind": "tr\n', "\n", "\xff\n"])
def test_a_damaged_line_takes_no_others_with_it(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    content = line(0) + damage + line(1) + line(2) + damage + line(3)
    path.write_bytes(content.encode("latin-1"))
    assert steps(path) == [0, 1, 2, 3]
    (warning,) = truncate_metrics(path, 2)
    assert "metrics.jsonl has damaged lines, 1 in all" in warning
    assert steps(path) == [0, 1, 2]


def test_truncation_reads_a_line_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with path.open("w") as file:
        file.writelines(line(step, padding="x" * 400) for step in range(20_000))
    tracemalloc.start()
    truncate_metrics(path, 15_000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000 < path.stat().st_size
    assert path.read_bytes().count(b"\n") == 15_001


@pytest.fixture
def full_at_1000_bytes() -> Iterator[None]:
    """No file can be larger, until the test is over."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


FULL = "cannot be written to: the file would be larger"


@pytest.mark.usefixtures("full_at_1000_bytes")
def test_a_full_disk_keeps_the_old_json(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    write_json(path, {"old": 1})
    with pytest.raises(UserError, match=FULL):
        write_json(path, {"new": "x" * 2000})
    assert read_json(path) == {"old": 1}
    assert os.listdir(tmp_path) == ["result.json"]


@pytest.mark.usefixtures("full_at_1000_bytes")
def test_a_full_disk_keeps_the_records_so_far(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(path)

    def write() -> None:
        for step in range(100):
            writer.write({"step": step})

    with pytest.raises(UserError, match=FULL):
        write()
    found = steps(path)
    assert found == list(range(len(found)))
    assert len(found) > 50
    with pytest.raises(UserError, match=FULL):  # of the line that could not be written
        writer.close()
    truncate_metrics(path, 40)
    assert steps(path) == list(range(41))


@pytest.mark.parametrize("content", ["", '{"x', "[1]", "\xff"])
def test_a_damaged_json_file_is_a_sentence(content: str, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    assert read_json(path) is None
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=r"result\.json is damaged; restore it, or remove it"):
        read_json(path)
