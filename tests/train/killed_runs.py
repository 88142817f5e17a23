"""Runs of one config with every optimizer, each killed with SIGKILL and continued.

Started as a process by test_catalogue.py: killed_runs.py CONFIG.toml FOLDER NAME...

A process of its own, forked from this one, does a run and dies at an instant of a step that the
name decides; others continue it, and do it without interruption. Prints a JSON object that has the
names of optimizers whose runs didn't go as they should, and what came instead.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

import steepest
from steepest.train import RunConfig, Runtime, checkpoints, run

EVERY = 3
RUNTIME = Runtime(threads=1, log_every=1, checkpoint_every=EVERY)


def in_a_fork(work: Callable[[], object]) -> int:
    """Do something in a forked process; return how that ended."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed(config: RunConfig, runs: Path, instant: str, step: int) -> None:
    """Do a run that dies."""
    from crash import set_trap  # type: ignore[import-not-found]  # from the folder of this script

    set_trap(instant, step)
    run(config, runs, runtime=RUNTIME)


def often(name: str) -> dict[str, int]:
    """Return hyperparameters with which what comes every so many steps comes every second one."""
    known = steepest.describe(name).hyperparameters
    return {key: 2 for key in known if key.endswith("_interval")}


def drawn(name: str, steps: int) -> tuple[str, int]:
    """Return an instant for the kill, and a step; a checkpoint is there by then."""
    draw = random.Random(name)
    instant = draw.choice(["record", "torn", "saving", "saved"])
    if instant in ("record", "torn"):
        return instant, draw.randrange(EVERY + 1, steps)
    last = (steps - 1) // EVERY
    return instant, EVERY * draw.randint(2 if instant == "saving" else 1, last)


def began(runs: Path) -> list[int]:
    """Return the steps that the sessions of a run began after."""
    (folder,) = runs.iterdir()
    sessions = json.loads((folder / "environment.json").read_text())["sessions"]
    return [session["step"] for session in sessions]


def state_of(runs: Path) -> dict[str, object]:
    """Return all that must be equal of a run, as bytes and numbers."""
    (folder,) = runs.iterdir()
    newest = checkpoints.newest(folder / "checkpoints")
    assert newest is not None
    state = checkpoints.load(newest)
    result = json.loads((folder / "result.json").read_text())
    found: dict[str, object] = {"status": result["status"], "val_loss": result["val_loss"]}
    flatten({key: state[key] for key in state if key != "clock"}, "", found)
    return found


def flatten(value: object, place: str, found: dict[str, object]) -> None:
    """Put all that is in a value into `found`, by its place."""
    if isinstance(value, torch.Tensor):
        plain = value.dequantize() if hasattr(value, "codes") else value
        found[place] = (
            str(plain.dtype),
            plain.contiguous().view(-1).view(torch.uint8).numpy().tobytes(),
        )
    elif isinstance(value, dict):
        for key, item in value.items():
            flatten(item, f"{place}.{key}", found)
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            flatten(item, f"{place}[{index}]", found)
    else:
        found[place] = repr(value)


def problem(name: str, base: RunConfig, folder: Path) -> str:
    """Return what was wrong with the runs of an optimizer; nothing if they were right."""
    optimizer = dataclasses.replace(base.optimizer, name=name, options=often(name))
    config = dataclasses.replace(base, optimizer=optimizer)
    instant, step = drawn(name, config.training.steps)
    whole, cut = folder / name / "whole", folder / name / "killed"
    code = in_a_fork(lambda: killed(config, cut, instant, step))
    if code != -signal.SIGKILL:
        return f"exit code {code} instead of the kill at {instant} {step}"
    for runs in (cut, whole):
        if code := in_a_fork(lambda runs=runs: run(config, runs, runtime=RUNTIME)):
            return f"exit code {code} in {runs}"
    if not (len(sessions := began(cut)) == 2 and sessions[1] > 0):
        return f"after {instant} {step}: sessions began after steps {sessions}"
    left, right = state_of(cut), state_of(whole)
    if left["status"] != "finished":
        return str(left["status"])
    other = [key for key in left.keys() | right.keys() if left.get(key) != right.get(key)]
    return f"after {instant} {step}: {', '.join(sorted(other)[:5])} differ" if other else ""


if __name__ == "__main__":
    file, where, *names = sys.argv[1:]
    torch.set_num_threads(1)
    config = RunConfig.from_toml(Path(file))
    problems = {name: found for name in names if (found := problem(name, config, Path(where)))}
    print(json.dumps(problems))
