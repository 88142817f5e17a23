"""The leaderboard and the warnings for the terminal."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from steepest.report import answer, formatting, limits
from steepest.report.findings import Findings
from steepest.study.store import Race


def summary(race: Race) -> Group:
    """Return the answer, the leaderboard and the warnings, to be printed by rich."""
    findings = Findings(race)
    parts: list[RenderableType] = [Text(answer.headline(findings), style="bold")]
    if findings.rows:
        parts += [Text(), _table(findings)]
    parts += [Text(f"Warning: {warning}", style="yellow") for warning in limits.warnings(findings)]
    return Group(*parts)


def leaderboard(race: Race) -> Table:
    """Return the leaderboard as a rich table."""
    return _table(Findings(race))


def _table(findings: Findings) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    columns = formatting.columns(findings.race.baseline)
    for column in columns:
        table.add_column(Text(column.short), justify="right" if column.numeric else "left")
    for row in findings.rows:
        cells = [column.cell(row) for column in columns]
        table.add_row(*(_text(cell) for cell in cells), style="bold" if row.rank == 1 else "")
    return table


def _text(cell: formatting.Cell) -> Text:
    """Return the cell as text that is not read as markup: names come from users."""
    text = Text(cell.text)
    if cell.detail:
        text.append(f" {cell.detail}", style="yellow" if cell.warn else "dim")
    return text
