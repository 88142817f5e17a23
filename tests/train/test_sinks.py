"""Metrics in TensorBoard, Weights & Biases and trackio."""

from __future__ import annotations

import io
import json
import sqlite3
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from steepest.errors import UserError
from steepest.train import Runtime, read_metrics, run, sinks
from steepest.train.learner import Learner

from .conftest import MakeConfig


def runtime(*names: sinks.SinkName) -> Runtime:
    return Runtime(threads=1, log_every=2, checkpoint_every=4, sinks=names)


def expected(folder: Path) -> dict[str, dict[int, float]]:
    """Return all numbers of metrics.jsonl by the names that sinks have for them, and step."""
    found: dict[str, dict[int, float]] = {}

    def take(step: int, name: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, part in value.items():
                take(step, f"{name}/{key}", part)
        else:
            found.setdefault(name, {})[step] = value

    for record in read_metrics(folder / "metrics.jsonl"):
        for key in record.keys() - {"kind", "step"}:
            take(record["step"], f"{record['kind']}/{key}", record[key])
    assert {"train/lr/hidden", "train/loss", "eval/val_loss"} <= set(found)
    return found


def in_tensorboard(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return steps and values by name, in the order in which TensorBoard has them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {
        name: [(event.step, event.value) for event in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }


def test_tensorboard_has_what_metrics_have(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(name="muon", steps=8, every=4)
    result = run(config, tmp_path, runtime=runtime("tensorboard"))
    folder = tmp_path / result["hash"]
    scalars = in_tensorboard(folder)
    metrics = expected(folder)
    assert scalars.keys() == metrics.keys()
    for name, numbers in metrics.items():
        assert dict(scalars[name]) == pytest.approx(numbers)


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


def in_wandb(file: Path) -> tuple[dict[str, list[tuple[int, float]]], int | None]:
    """Return steps and values by name, and the exit code, from the file of an offline run."""
    import wandb

    wandb.teardown()  # the program that writes it does so after the end of a run, too
    found: dict[str, list[tuple[int, float]]] = {}
    ended = None
    for record in wandb_records(file):
        if record.WhichOneof("record_type") == "history":
            items = {
                item.key or "/".join(item.nested_key): json.loads(item.value_json)
                for item in record.history.item
            }
            for name, value in items.items():
                found.setdefault(name, []).append((items["_step"], value))
        elif record.WhichOneof("record_type") == "exit":
            ended = record.exit.exit_code
    return found, ended


@pytest.fixture
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


@pytest.mark.usefixtures("_offline")
def test_wandb_offline_has_what_metrics_have(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(name="muon", steps=8, every=4)
    result = run(config, tmp_path, runtime=runtime("wandb"))
    folder = tmp_path / result["hash"]
    (file,) = folder.glob(f"wandb/offline-run-*/run-{result['hash']}.wandb")
    found, ended = in_wandb(file)
    assert ended == 0
    for name, numbers in expected(folder).items():
        assert dict(found[name]) == pytest.approx(numbers)


@pytest.mark.slow
@pytest.mark.usefixtures("_offline")
def test_the_offline_files_of_a_killed_process_are_complete(tmp_path: Path) -> None:
    """What a run told is not lost with its process: another one of wandb's writes it."""
    program = """
import os, pathlib, sys
from steepest.train.sinks import Sinks
sinks = Sinks(("wandb",), pathlib.Path(sys.argv[1]), run="abc", config={})
for step in range(50):
    sinks.write({"kind": "train", "step": step, "loss": 1.0})
sinks.close(failed=False)
os.kill(os.getpid(), 9)
"""
    command = [sys.executable, "-c", program, str(tmp_path)]
    assert subprocess.run(command, check=False).returncode == -9
    (file,) = tmp_path.glob("wandb/offline-run-*/run-abc.wandb")
    for _ in range(100):
        found, ended = in_wandb(file)
        if ended is not None:
            break
        time.sleep(0.1)
    assert ended == 0
    assert found["train/loss"] == [(step, 1.0) for step in range(50)]


@pytest.fixture(scope="module")
def trackio_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return where trackio keeps its runs; it looks once in a process."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("trackio")
        patch.setenv("TRACKIO_DIR", str(folder))
        import trackio

        assert folder == trackio.TRACKIO_DIR
        yield folder


def in_trackio(folder: Path, run: str) -> dict[str, list[tuple[int, float]]]:
    """Return a run's steps and values by name."""
    (database,) = folder.glob("*.db")
    with sqlite3.connect(database) as connection:
        rows = connection.execute(
            "SELECT step, metrics FROM metrics WHERE run_name = ?", (run,)
        ).fetchall()
    found: dict[str, list[tuple[int, float]]] = {}
    for step, metrics in rows:
        for key, value in json.loads(metrics).items():
            found.setdefault(key, []).append((step, value))
    return found


def test_trackio_has_what_metrics_have(
    make_config: MakeConfig, tmp_path: Path, trackio_folder: Path
) -> None:
    config = make_config(name="muon", steps=8, every=4)
    result = run(config, tmp_path, runtime=runtime("trackio"))
    found = in_trackio(trackio_folder, result["hash"])
    for name, numbers in expected(tmp_path / result["hash"]).items():
        assert dict(found[name]) == pytest.approx(numbers)


@pytest.mark.usefixtures("_offline")
@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
@pytest.mark.parametrize("kept", [4, -1])  # the last step of a checkpoint; none
def test_a_resumed_run_has_every_step_once(
    name: sinks.SinkName, kept: int, tmp_path: Path, trackio_folder: Path
) -> None:
    """A killed process had sent steps up to 6, but not 2 to 4."""
    called = f"kept{kept}"
    everything = [
        record
        for step in range(9)
        for record in (
            {"kind": "train", "step": step, "loss": 1.0 / (1 + step)},
            {"kind": "eval", "step": step, "val_loss": 2.0 / (1 + step)},
        )
    ]

    def process(*, first: int, sent: list[int]) -> None:
        written = [json.dumps(r) + "\n" for r in everything if r["step"] < first]
        (tmp_path / "metrics.jsonl").write_text("".join(written))
        with sinks.Sinks((name,), tmp_path, run=called, config={}) as opened:
            for record in everything:
                if record["step"] in sent:
                    opened.write(record)
        assert opened.warnings == []

    process(first=0, sent=[0, 1, 5, 6])
    if name == "wandb":
        time.sleep(1)  # its folders are called by the second
    process(first=kept + 1, sent=list(range(kept + 1, 9)))
    if name == "tensorboard":
        found = in_tensorboard(tmp_path)
    elif name == "wandb":
        found, _ = in_wandb(max(tmp_path.glob("wandb/offline-run-*/*.wandb")))
    else:
        found = in_trackio(trackio_folder, called)
    for key in ("loss", "val_loss"):
        tag = f"{'train' if key == 'loss' else 'eval'}/{key}"
        numbers = [(r["step"], r[key]) for r in everything if key in r]
        assert [step for step, _ in found[tag]] == list(range(9))
        assert dict(found[tag]) == pytest.approx(dict(numbers))


def test_steps_that_a_server_has_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Resumed:
        starting_step = 3
        had: ClassVar[list[int]] = []

        def log(self, numbers: dict[str, float], step: int) -> None:
            self.had.append(step)

    monkeypatch.setattr("wandb.init", lambda **_: Resumed())
    opened = sinks.Sinks(("wandb",), tmp_path, run="abc", config={})
    for step in range(6):
        opened.write({"kind": "train", "step": step, "loss": 1.0})
    assert Resumed.had == [3, 4, 5]


def test_wandb_asks_nothing_and_does_not_wait_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A run in a terminal must not stand because nobody answers, be it a person or a server."""
    monkeypatch.delenv("WANDB_FINISH_TIMEOUT", raising=False)
    settings: list[Any] = []

    class Slow:
        starting_step = 0

        def finish(self, exit_code: int) -> None:
            raise TimeoutError("Timed out finishing run.")

    def init(**arguments: Any) -> Slow:
        assert not sys.stdin.isatty()
        settings.append(arguments["settings"])
        return Slow()

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("wandb.init", init)
    monkeypatch.setattr(sys, "stdin", Terminal())
    opened = sinks.Sinks(("wandb",), tmp_path, run="abc", config={})
    assert sys.stdin.isatty()
    assert settings[0].finish_timeout == sinks.UPLOAD_SECONDS
    assert settings[0].finish_timeout_raises
    opened.close(failed=False)
    assert caplog.messages == [
        "wandb failed and gets no more metrics (TimeoutError: Timed out finishing run.)."
    ]


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
    make_config: MakeConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    broken, kept = Broken(), Kept()

    def opened(name: str, *_: object) -> Broken:
        if name == "wandb":
            raise ConnectionError("no network")
        return {"tensorboard": broken, "trackio": kept}[name]

    monkeypatch.setattr(sinks, "_open", opened)
    monkeypatch.setattr(sinks, "check", lambda _: None)
    result = run(make_config(steps=6), tmp_path, runtime=runtime("wandb", "tensorboard", "trackio"))
    assert result["status"] == "finished"
    assert result["warnings"] == [
        "wandb failed and gets no more metrics (ConnectionError: no network).",
        "tensorboard failed and gets no more metrics (OSError: No space left on device).",
    ]
    assert caplog.messages == result["warnings"]
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
