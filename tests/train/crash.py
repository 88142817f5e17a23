"""Run a config, and die of SIGKILL at a given instant. Started as a process by test_resume.py.

crash.py CONFIG.toml RUNS_DIR INSTANT STEP, with INSTANT one of
  record      after the record of STEP is written
  torn        in the middle of writing the record of STEP
  saving      in the middle of writing the checkpoint of STEP
  saved       after the checkpoint of STEP is in place, before older ones are removed
  result      before the result is written
  wait        never by itself: stop for the parent after the record of STEP
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import time
from pathlib import Path
from typing import IO, Any

import torch

from steepest.train import RunConfig, Runtime, checkpoints, records, run

RUNTIME = Runtime(threads=1, checkpoint_every=7, log_every=1, dynamics_every=10)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def set_trap(instant: str, step: int) -> None:
    write, save, prune = records.MetricsWriter.write, torch.save, checkpoints._newest_first

    def trapped_write(self: records.MetricsWriter, record: dict[str, Any]) -> None:
        at_step = record.get("kind") == "train" and record["step"] == step
        if instant == "torn" and at_step:
            self._file.write('{"kind": "train", "st')
            self._file.flush()
            die()
        write(self, record)
        if instant == "record" and at_step:
            die()
        if instant == "wait" and at_step:
            time.sleep(60)

    def trapped_save(state: dict[str, Any], file: IO[bytes]) -> None:
        save(state, file)
        if instant == "saving" and state["step"] == step:
            file.truncate(file.tell() // 2)
            die()

    def trapped_prune(folder: Path) -> list[Path]:
        if instant == "saved" and checkpoints.path_of(folder, step).exists():
            die()
        return prune(folder)

    records.MetricsWriter.write = trapped_write  # type: ignore[method-assign]
    torch.save = trapped_save
    checkpoints._newest_first = trapped_prune
    if instant == "result":
        records.write_json = lambda path, content: die() if path.name == "result.json" else None


if __name__ == "__main__":
    config, runs, instant, step = sys.argv[1:]
    faulthandler.dump_traceback_later(20)  # the test shows where a slow process was
    set_trap(instant, int(step))
    run(RunConfig.from_toml(Path(config)), Path(runs), runtime=RUNTIME)
