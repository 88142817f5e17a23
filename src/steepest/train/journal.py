"""Where a run's records go: metrics.jsonl, and the sinks that were asked for."""

from __future__ import annotations

from typing import Any, Self

from steepest.data import TokenData
from steepest.train import evaluation, records
from steepest.train.config import Runtime
from steepest.train.folder import RunFolder
from steepest.train.run_state import RunState
from steepest.train.sinks import Sinks
from steepest.train.step_taken import StepTaken


class Journal:
    """Writes the records of a run from its present step on; `writes` says if this process does.

    Records of later steps, which a killed process has left, are dropped; `warnings` says what else
    was wrong with them. Use it in a `with`, which closes all.
    """

    def __init__(
        self,
        state: RunState,
        tokens: TokenData,
        folder: RunFolder,
        runtime: Runtime,
        *,
        writes: bool,
    ) -> None:
        self.state, self.tokens = state, tokens
        self.metrics: records.MetricsWriter | None = None
        self.warnings: list[str] = []
        if writes:
            step = state.step if state.step else -1
            self.warnings = records.truncate_metrics(folder.metrics, step)
            self.metrics = records.MetricsWriter(folder.metrics)
        self.sinks = Sinks(
            runtime.sinks if writes else (),
            folder.path,
            run=state.config.hash(),
            config=state.config.to_dict(),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.sinks.close(failed=kind is not None)
        if self.metrics is not None:
            self.metrics.close()

    def write_step(self, done: StepTaken) -> None:
        """Record the numbers of a training step, unless its loss is not one."""
        if self.metrics is None:
            return
        config, state = self.state.config, self.state
        numbers = done.numbers(config.training.clip_norm)
        if numbers["loss"] is None:
            return
        score = evaluation.Score(numbers["loss"], self.tokens.train.bytes_per_token)
        mfu = state.mfu
        self.write(
            "train",
            done.step,
            tokens=done.rows * config.data.sequence_length,
            **numbers,
            bits_per_byte=score.bits_per_byte,
            loss_spikes=state.spikes.count,
            skipped_steps=state.skipped,
            **({"mfu": mfu} if mfu is not None else {}),
            **({"memory_bytes": state.memory} if done.step == 1 else {}),
        )

    def write(self, kind: str, step: int, **numbers: Any) -> None:
        """Append a record, with the tokens and the time so far."""
        if self.metrics is None:
            return
        state = self.state
        place = {"kind": kind, "step": step, "tokens": state.tokens}
        times = {name: round(seconds, 6) for name, seconds in state.clock.totals().items()}
        seconds = {
            "elapsed_seconds": round(state.clock.elapsed_seconds, 6),
            "seconds": round(state.clock.seconds, 6),
            "part_seconds": times,
        }
        record = {**place, **numbers, **seconds}
        self.metrics.write(record)
        self.sinks.write(record)

    def sync(self) -> None:
        """Wait until all records are on the disk."""
        if self.metrics is not None:
            self.metrics.sync()
