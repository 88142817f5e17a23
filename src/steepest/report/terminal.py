"""The leaderboard and the warnings for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console, ConsoleOptions, Group, JustifyMethod, RenderableType, RenderResult
from rich.measure import Measurement
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
        parts += [Text(), Leaderboard(findings)]
    parts += [Text(f"Warning: {warning}", style="yellow") for warning in limits.warnings(findings)]
    return Group(*parts)


def leaderboard(race: Race) -> Leaderboard:
    """Return the leaderboard, to be printed by rich."""
    return Leaderboard(Findings(race))


class Leaderboard:
    """One table where it fits; in a narrow terminal, one of losses and one of costs."""

    def __init__(self, findings: Findings) -> None:
        self.findings = findings

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        columns = formatting.columns(self.findings.race.baseline)
        whole = _table(self.findings, columns)
        if Measurement.get(console, options.update(width=1000), whole).maximum <= options.max_width:
            yield whole
            return
        costs = [column for column in columns if column.cost]
        yield _table(self.findings, [column for column in columns if not column.cost])
        yield Text()
        yield _table(self.findings, [columns[0], columns[1], *costs])


def _table(findings: Findings, columns: Sequence[formatting.Column]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in columns:
        justify: JustifyMethod = "right" if column.numeric else "left"
        table.add_column(Text(column.short), justify=justify, no_wrap=True)
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
