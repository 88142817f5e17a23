from __future__ import annotations

import re
from dataclasses import replace

from rich.console import Console

from steepest.report import formatting, markdown, terminal
from steepest.report.findings import Findings


def printed(renderable) -> str:
    console = Console(width=200, force_terminal=False)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


def test_terminal_shows_every_cell_and_warning(race):
    text = printed(terminal.summary(race))
    for row in Findings(race).rows:
        line = next(line for line in text.splitlines()[3:] if f" {row.optimizer} " in line)
        for column in formatting.columns(race.baseline):
            assert str(column.cell(row)) in line
    assert text.startswith("soap and muon are tied for first")
    assert text.count("Warning: ") == 2


def test_terminal_does_not_read_names_as_markup(race):
    name = "[red]x[/red]"
    final = {name: race.final["muon"], "adamw": race.final["adamw"]}
    runs = {
        h: replace(run, optimizer=name) for h, run in race.runs.items() if run.optimizer == "muon"
    }
    odd = replace(race, final=final, tuning={}, runs={**race.runs, **runs})
    assert name in printed(terminal.leaderboard(odd))


def test_markdown_table_has_the_same_cells(race):
    lines = markdown.leaderboard(race).splitlines()
    columns = formatting.columns(race.baseline)
    rows = Findings(race).rows
    assert len(lines) == 2 + len(rows)
    for line, row in zip(lines[2:], rows, strict=True):
        cells = re.split(r"(?<!\\)\|", line)[1:-1]
        plain = [re.sub(r"\\(.)", r"\1", cell).strip() for cell in cells]
        assert plain == [str(column.cell(row)) for column in columns]


def test_markdown_escapes_names(race):
    assert r"mine.py:\<Mine\>" in markdown.leaderboard(race)
