"""The leaderboard as a Markdown table."""

from __future__ import annotations

import re

from steepest.report import formatting
from steepest.report.findings import Findings
from steepest.study.store import Race


def leaderboard(race: Race) -> str:
    """Return the leaderboard as a GitHub-flavoured Markdown table that ends with a line break."""
    columns = formatting.columns(race.baseline)
    lines = [
        _line([_escape(column.title) for column in columns]),
        _line(["---:" if column.numeric else ":---" for column in columns]),
    ]
    lines += [
        _line([_escape(str(column.cell(row))) for column in columns]) for row in Findings(race).rows
    ]
    return "\n".join(lines) + "\n"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _escape(text: str) -> str:
    """Return text that Markdown shows as it is."""
    return re.sub(r"([\\`*_{}\[\]<>|#])", r"\\\1", " ".join(text.split()))
