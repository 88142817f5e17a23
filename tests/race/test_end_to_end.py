"""A race as a person runs it, from the command to the report."""

from __future__ import annotations

import json
import math
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from steepest.study.store import load_race

pytestmark = pytest.mark.slow

COMMAND = [
    *(sys.executable, "-m", "steepest", "race", "sgd", "adamw", "muon"),
    *("--tokens", "102400", "--seeds", "2", "--out", "race"),
    *("--lrs", "sgd=0.1,0.3", "adamw=0.003,0.01", "muon=0.01,0.02"),
]


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("end_to_end")
    done = subprocess.run(
        COMMAND, cwd=folder, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder / "race", done.stdout


def test_every_optimizer_learns_and_is_ranked(printed: tuple[Path, str]) -> None:
    race = load_race(printed[0])
    assert len(race.runs) == 3 * (2 + 2)
    assert not race.unfinished
    for run in race.runs.values():
        assert run.status == "finished"
        assert run.val_loss is not None
        first = run.evaluations[0].val_loss
        assert abs(first - math.log(512)) < 0.2  # a uniform guess over the vocabulary
        assert run.val_loss < first - 1


def test_what_is_printed_is_what_the_runs_say(printed: tuple[Path, str]) -> None:
    folder, text = printed
    assert "about" in text.split("Results:")[0]  # an estimate of the time, before the first run
    assert len(re.findall(r"^\[ *\d+/12\] ", text, re.MULTILINE)) == 12
    race = json.loads((folder / "race.json").read_text())
    results = {
        path.parent.name: json.loads(path.read_text()) for path in folder.glob("runs/*/result.json")
    }
    means = {
        name: statistics.mean(results[h]["val_loss"] for h in hashes)
        for name, hashes in race["final"].items()
    }
    best = min(means, key=lambda name: means[name])
    table = text[text.index("val loss") :]
    lines = [line for line in table.splitlines() if re.match(r" ?\d+=? ", line)][:3]
    names = [line.split()[1] for line in lines]
    assert names == sorted(means, key=lambda name: means[name])
    assert lines[0].split()[1] == best
    for line, name in zip(lines, names, strict=True):
        shown = re.search(r"(\d\.\d+) ±", line)
        assert shown, line
        digits = len(shown[1].split(".")[1])
        assert math.isclose(float(shown[1]), means[name], abs_tol=0.6 * 10**-digits)


def test_report_stands_alone_and_names_every_run(printed: tuple[Path, str]) -> None:
    folder, _ = printed
    page = (folder / "report.html").read_text()
    assert not re.findall(r'<(?:script|link|img)\b[^>]*(?:src|href)="(?!data:)', page)
    for run in load_race(folder).runs:
        assert f'id="run-{run}"' in page
        assert f'href="runs/{run}/' in page


def test_the_same_command_does_nothing_again(printed: tuple[Path, str]) -> None:
    folder, _ = printed
    written = {path: path.stat().st_mtime_ns for path in folder.glob("runs/*/result.json")}
    done = subprocess.run(
        COMMAND, cwd=folder.parent, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert {path: path.stat().st_mtime_ns for path in folder.glob("runs/*/result.json")} == written
