"""Sending a run's metrics elsewhere as they come: TensorBoard, Weights & Biases, trackio.

metrics.jsonl is what a run leaves; these are views of it. Each is an extra package, imported when
asked for, and none can end a run: what fails is told once and no longer used.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol, Self

from steepest.errors import UserError
from steepest.train import records

SinkName = Literal["tensorboard", "wandb", "trackio"]
PROJECT = "steepest"
"""The project of runs in Weights & Biases (unless WANDB_PROJECT names another) and trackio."""
UPLOAD_SECONDS = 60
"""How long the end of a run waits for Weights & Biases, unless WANDB_FINISH_TIMEOUT says."""


class Sink(Protocol):
    """Somewhere to send numbers to."""

    def write(self, step: int, numbers: dict[str, float]) -> None:
        """Send the numbers of a step."""

    def close(self, failed: bool) -> None:
        """Send what is left, and say whether the run failed."""


def check(names: Sequence[SinkName]) -> None:
    """Raise UserError if the package of a sink is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"runtime.sinks names {name}, which is not installed; "
                "pip install 'steepest[sinks]' has it."
            )


class Sinks:
    """All sinks of a run in `folder`; `config` is shown with it.

    The run is called by its hash wherever it goes. A resumed run is sent from its start, the
    records in metrics.jsonl first: what a killed process had sent may have gaps, and steps that are
    taken again. `warnings` has a sentence per sink that failed.
    """

    def __init__(
        self,
        names: Sequence[SinkName],
        folder: Path,
        *,
        run: str,
        config: dict[str, Any],
    ) -> None:
        self.warnings: list[str] = []
        self.open: dict[str, Sink] = {}
        for name in names:
            try:
                self.open[name] = _open(name, folder, run, config)
            except Exception as error:  # whatever a service raises where it can't be reached
                self._give_up(name, error)
        if self.open:
            for record in records.read_metrics(folder / "metrics.jsonl"):
                self.write(record)

    def write(self, record: Mapping[str, Any]) -> None:
        """Send a record of metrics.jsonl: its numbers, under names such as train/lr/hidden."""
        kind, step = record["kind"], record["step"]
        rest = {k: v for k, v in record.items() if k not in ("kind", "step")}
        numbers = {f"{kind}/{name}": number for name, number in flat(rest)}
        for name, sink in list(self.open.items()):
            try:
                sink.write(step, numbers)
            except Exception as error:
                self._give_up(name, error)

    def close(self, *, failed: bool) -> None:
        """Send what is left; `failed` says that an exception ends the run."""
        for name, sink in list(self.open.items()):
            try:
                sink.close(failed)
            except Exception as error:
                self._give_up(name, error)
        self.open.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(failed=kind is not None)

    def _give_up(self, name: str, error: Exception) -> None:
        self.open.pop(name, None)
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        self.warnings.append(f"{name} failed and gets no more metrics ({reason}).")
        logging.getLogger("steepest").warning(self.warnings[-1])


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yield the numbers of nested dictionaries, under their keys joined by "/"."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield prefix + key, value


def _open(name: SinkName, folder: Path, run: str, config: dict[str, Any]) -> Sink:
    if name == "tensorboard":
        return _TensorBoard(folder)
    if name == "wandb":
        return _WeightsAndBiases(folder, run, config)
    return _Trackio(run, config)


class _TensorBoard:
    """Event files in tensorboard/ of the run's folder; a new one hides those before it."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=0, flush_secs=10)

    def write(self, step: int, numbers: dict[str, float]) -> None:
        for name, number in numbers.items():
            self.writer.add_scalar(name, number, step)

    def close(self, failed: bool) -> None:
        self.writer.close()


class _WeightsAndBiases:
    """A run of Weights & Biases, whose files are in wandb/ of the run's folder.

    The environment variables of wandb apply, as WANDB_MODE=offline. A resumed run goes on with the
    same id; steps that the server has already are left out. Offline, every process leaves a folder,
    and the newest has the whole run; it is complete a moment after `close`, in any case when the
    process has ended.
    """

    def __init__(self, folder: Path, run: str, config: dict[str, Any]) -> None:
        import wandb

        settings = wandb.Settings(console="off", finish_timeout_raises=True)
        if "WANDB_FINISH_TIMEOUT" not in os.environ:
            settings.finish_timeout = UPLOAD_SECONDS
        with _without_questions():
            self.run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                id=run,
                name=run,
                dir=folder,
                config=config,
                resume="allow",
                settings=settings,
            )
        self.first_step = self.run.starting_step

    def write(self, step: int, numbers: dict[str, float]) -> None:
        if step >= self.first_step:
            self.run.log(numbers, step=step)

    def close(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


class _Trackio:
    """A run of trackio, in its database on this machine (TRACKIO_DIR), where it replaces the run
    that a killed process left.
    """

    def __init__(self, run: str, config: dict[str, Any]) -> None:
        import trackio

        self.trackio: Any = trackio
        for left in _runs_of(trackio):
            if left.name == run:
                left.delete()
        self.run = trackio.init(
            project=PROJECT,
            name=run,
            config=config,
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def write(self, step: int, numbers: dict[str, float]) -> None:
        self.run.log(numbers, step=step)

    def close(self, failed: bool) -> None:
        self.trackio.finish()  # the run's own method would be called again at exit


def _runs_of(trackio: Any) -> list[Any]:
    try:
        return list(trackio.Api().runs(PROJECT))
    except ValueError:  # no run has been sent yet, so there is no project
        return []


@contextmanager
def _without_questions() -> Iterator[None]:
    """Have no terminal to ask at while the context lasts: a run must not stand and wait."""
    terminal = sys.stdin
    with open(os.devnull, encoding="utf-8") as nothing:
        sys.stdin = nothing
        try:
            yield
        finally:
            sys.stdin = terminal
