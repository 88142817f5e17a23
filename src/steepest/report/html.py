"""The report of a race as one HTML file that needs nothing else."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from steepest import files
from steepest.analysis import Run
from steepest.report import answer, formatting, limits
from steepest.report.charts import Chart, charts
from steepest.report.findings import Findings
from steepest.report.styles import Style, styles
from steepest.study.store import Race, UnfinishedRun


def write(race: Race, path: Path) -> None:
    """Write the report to `path`, atomically. Links to runs are relative to it."""
    files.write_text(Path(path), render(race, Path(path).parent))


def render(race: Race, folder: Path) -> str:
    """Return the report as HTML text, for a file in `folder`."""
    findings = Findings(race)
    drawn = styles(findings.names, race.baseline)
    pictures = charts(findings, drawn)
    environment = Environment(
        loader=PackageLoader("steepest.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    columns = formatting.columns(race.baseline)
    return environment.get_template("report.html").render(
        race=race,
        created=race.created.replace("T", " ")[:16],
        headline=answer.headline(findings),
        details=answer.details(findings),
        warnings=limits.warnings(findings),
        limits=limits.limits(findings),
        columns=columns,
        rows=[(row, [column.cell(row) for column in columns]) for row in findings.rows],
        styles=drawn,
        charts=pictures,
        protocol={key: formatting.plain(value) for key, value in race.protocol.items()},
        race_seconds=formatting.duration(race.seconds),
        environment=_environment(race),
        groups=_groups(findings, drawn, folder),
        run_count=len(race.runs) + len(race.unfinished),
        css=_asset(environment, "report.css"),
        js=_asset(environment, "report.js"),
        plotly=_plotly() if pictures else "",
        chart_data=_chart_data(pictures),
    )


def _asset(environment: Environment, name: str) -> Markup:
    """Return a file of our own, not to be escaped."""
    assert environment.loader is not None
    return Markup(environment.loader.get_source(environment, name)[0])


@cache
def _plotly() -> Markup:
    from plotly.offline import get_plotlyjs

    return Markup(get_plotlyjs())


def _chart_data(pictures: list[Chart]) -> Markup:
    """Return the charts as JSON that can't end the script element which holds it."""
    content = {c.id: {"data": c.data, "layout": c.layout} for c in pictures}
    text = json.dumps(content, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _environment(race: Race) -> dict[str, str]:
    """Return what the runs executed on; where runs differ, each value with its number of runs."""
    counts: dict[str, dict[str, int]] = {}
    for environment in race.environments.values():
        for key, value in environment.items():
            if isinstance(value, (list, dict)):
                continue
            seen = counts.setdefault(key, {})
            text = formatting.plain(value)
            seen[text] = seen.get(text, 0) + 1
    return {
        key: next(iter(seen))
        if len(seen) == 1
        else "; ".join(f"{text} ({formatting.plural(n, 'run')})" for text, n in seen.items())
        for key, seen in counts.items()
    }


@dataclass(frozen=True)
class RunLine:
    """A run in the table of runs."""

    hash: str
    link: str
    stage: Literal["tuning", "final"]
    learning_rate: str
    seed: str
    status: str
    notes: tuple[str, ...]
    loss: str
    tokens: str
    seconds: str


@dataclass(frozen=True)
class RunGroup:
    """All runs of an optimizer."""

    optimizer: str
    style: Style
    lines: list[RunLine]


def _groups(findings: Findings, drawn: dict[str, Style], folder: Path) -> list[RunGroup]:
    race = findings.race
    unfinished = {run.hash: run for run in race.unfinished}
    order = [row.optimizer for row in findings.rows]
    order += [name for name in findings.names if name not in order]
    groups = []
    for name in order:
        stages = dict.fromkeys(race.final.get(name, ()), "final")
        stages = {**dict.fromkeys(race.tuning.get(name, ()), "tuning"), **stages}
        lines = [
            _complete(race.runs[key], stage, _link(race, key, folder))
            if key in race.runs
            else _incomplete(unfinished[key], _link(race, key, folder))
            for key, stage in sorted(stages.items(), key=lambda item: item[1])
        ]
        groups.append(RunGroup(name, drawn[name], lines))
    return groups


def _link(race: Race, run_hash: str, folder: Path) -> str:
    relative = os.path.relpath(race.run_directory(run_hash), folder)
    return quote(Path(relative).as_posix()) + "/"


def _complete(run: Run, stage: Any, link: str) -> RunLine:
    notes: Iterable[str] = [run.reason] if run.reason else []
    return RunLine(
        hash=run.hash,
        link=link,
        stage=stage,
        learning_rate=formatting.learning_rate(run.lr),
        seed=str(run.seed),
        status=run.status,
        notes=(*notes, *run.warnings),
        loss=formatting.NONE if run.val_loss is None else f"{run.val_loss:.4f}",
        tokens=f"{run.tokens:,}",
        seconds=f"{run.seconds:.1f}",
    )


def _incomplete(run: UnfinishedRun, link: str) -> RunLine:
    return RunLine(
        hash=run.hash,
        link=link,
        stage=run.stage,
        learning_rate=formatting.NONE if run.lr is None else formatting.learning_rate(run.lr),
        seed=formatting.NONE if run.seed is None else str(run.seed),
        status="unfinished",
        notes=(),
        loss=formatting.NONE,
        tokens=f"{run.tokens:,}",
        seconds=f"{run.seconds:.1f}",
    )
