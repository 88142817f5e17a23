"""Metrics in TensorBoard, Weights & Biases and trackio."""

from __future__ import annotations

import json
import sqlite3
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from steepest.errors import UserError
from steepest.train import Runtime, read_metrics, run, sinks
from steepest.train.learner import Learner

from .conftest import MakeConfig


def runtime(*names: sinks.SinkName) -> Runtime:
    return Runtime(threads=1, log_every=2, checkpoint_every=4, sinks=names)


def expected(folder: Path) -> dict[str, dict[int, float]]:
    """Return the numbers of metrics.jsonl by the names that sinks have for them, and step."""
    found: dict[str, dict[int, float]] = {}
    for record in read_metrics(folder / "metrics.jsonl"):
        found.setdefault(f"{record['kind']}/seconds", {})[record["step"]] = record["seconds"]
        if record["kind"] == "eval":
            found.setdefault("eval/val_loss", {})[record["step"]] = record["val_loss"]
        else:
            found.setdefault("train/loss", {})[record["step"]] = record["loss"]
            for role, lr in record["lr"].items():
                found.setdefault(f"train/lr/{role}", {})[record["step"]] = lr
    return found


def test_tensorboard_has_what_metrics_have(make_config: MakeConfig, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = make_config(name="muon", steps=8, every=4)
    result = run(config, tmp_path, runtime=runtime("tensorboard"))
    folder = tmp_path / result["hash"]
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    for name, numbers in expected(folder).items():
        found = {event.step: event.value for event in events.Scalars(name)}
        assert found == pytest.approx(numbers)
    assert not any("kind" in tag or "tokens/" in tag for tag in events.Tags()["scalars"])


def wandb_records(path: Path) -> Iterator[Any]:
    """Yield the records of a .wandb file: protocol buffers in a LevelDB log after 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:  # no header fits into the rest of a block
            at += 32768 - at % 32768
        _, length, kind = struct.unpack_from("<IHB", content, at)
        parts += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # the whole, or the last part
            yield Record.FromString(parts)
            parts = b""


def test_wandb_offline_has_what_metrics_have(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = make_config(name="muon", steps=8, every=4)
    result = run(config, tmp_path, runtime=runtime("wandb"))
    folder = tmp_path / result["hash"]
    (file,) = folder.glob(f"wandb/offline-run-*/run-{result['hash']}.wandb")
    found: dict[str, dict[int, float]] = {}
    ended = None
    for record in wandb_records(file):
        if record.WhichOneof("record_type") == "history":
            items = {
                item.key or "/".join(item.nested_key): json.loads(item.value_json)
                for item in record.history.item
            }
            for name, value in items.items():
                found.setdefault(name, {})[items["_step"]] = value
        elif record.WhichOneof("record_type") == "exit":
            ended = record.exit.exit_code
    assert ended == 0
    for name, numbers in expected(folder).items():
        assert found[name] == pytest.approx(numbers)


def test_trackio_has_what_metrics_have(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    config = make_config(name="muon", steps=8, every=4)
    result = run(config, tmp_path, runtime=runtime("trackio"))
    (database,) = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(database) as connection:
        rows = connection.execute("SELECT run_name, step, metrics FROM metrics").fetchall()
    found: dict[str, dict[int, float]] = {}
    for name, step, metrics in rows:
        assert name == result["hash"]
        for key, value in json.loads(metrics).items():
            found.setdefault(key, {})[step] = value
    for name, numbers in expected(tmp_path / result["hash"]).items():
        assert found[name] == pytest.approx(numbers)


class Broken:
    """A sink that fails when it is first written to."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def write(self, step: int, numbers: dict[str, float]) -> None:
        self.calls.append("write")
        raise OSError("No space left on device\nmore")

    def close(self, failed: bool) -> None:
        self.calls.append(f"close {failed}")


class Kept(Broken):
    def write(self, step: int, numbers: dict[str, float]) -> None:
        self.calls.append("write")


def test_a_failing_sink_ends_no_run_and_is_told_once(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken, kept = Broken(), Kept()

    def opened(name: str, *_: object) -> Broken:
        if name == "wandb":
            raise ConnectionError("no network")
        return {"tensorboard": broken, "trackio": kept}[name]

    monkeypatch.setattr(sinks, "_open", opened)
    monkeypatch.setattr(sinks, "check", lambda _: None)
    with pytest.warns(UserWarning, match="gets no more metrics") as told:
        result = run(
            make_config(steps=6), tmp_path, runtime=runtime("wandb", "tensorboard", "trackio")
        )
    assert result["status"] == "finished"
    assert result["warnings"] == [
        "wandb failed and gets no more metrics (ConnectionError: no network).",
        "tensorboard failed and gets no more metrics (OSError: No space left on device).",
    ]
    assert len([w for w in told if "gets no more metrics" in str(w.message)]) == 2
    assert broken.calls == ["write"]
    assert kept.calls[-1] == "close False"


def test_sinks_are_closed_when_a_run_breaks(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Kept()
    monkeypatch.setattr(sinks, "_open", lambda *_: kept)
    monkeypatch.setattr(sinks, "check", lambda _: None)

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Learner, "step", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        run(make_config(steps=6), tmp_path, runtime=runtime("trackio"))
    assert kept.calls == ["write", "close True"]


def test_a_missing_package_is_a_sentence(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)
    monkeypatch.setattr(sinks.importlib.util, "find_spec", lambda _: None)
    sentence = r"runtime\.sinks names trackio, which is not installed; pip install 'steepest\[sinks"
    with pytest.raises(UserError, match=sentence):
        run(make_config(steps=6), tmp_path, runtime=runtime("trackio"))
    assert not list(tmp_path.iterdir())


def test_flat() -> None:
    nested = {"a": 1, "b": {"c": {"d": 2.5}, "e": None}, "f": "text", "g": True}
    assert dict(sinks.flat(nested)) == {"a": 1, "b/c/d": 2.5}
