"""The color, mark and anchor of each optimizer: the same in every table and chart."""

from __future__ import annotations

import re
from dataclasses import dataclass

COLORS = 12
"""The palette has this many colors, --s0 to --s11 in report.css."""
DASHES = ("solid", "dash", "dot", "dashdot")
SYMBOLS = (
    "circle",
    "square",
    "diamond",
    "triangle-up",
    "triangle-down",
    "pentagon",
    "star",
    "hexagon",
    "cross",
    "hourglass",
    "bowtie",
    "star-diamond",
)


@dataclass(frozen=True)
class Style:
    """How an optimizer is drawn. `group` is the id of its part of the table of runs."""

    color: str
    dash: str
    symbol: str
    width: float
    group: str


def styles(names: list[str], baseline: str) -> dict[str, Style]:
    """Return the style of each optimizer; the baseline is neutral and thicker.

    Half of the palette after another, lines change their dashes, so that no two of the first 24 are
    told apart by a hard-to-see difference of color alone.
    """
    others = [name for name in names if name != baseline]
    groups = _groups(names)
    made = {
        name: Style(
            color=f"var(--s{i % COLORS})",
            dash=DASHES[2 * i // COLORS % len(DASHES)],
            symbol=SYMBOLS[i % len(SYMBOLS)],
            width=2,
            group=groups[name],
        )
        for i, name in enumerate(others)
    }
    made[baseline] = Style("var(--baseline)", "solid", "circle-open", 3, groups[baseline])
    return made


def _groups(names: list[str]) -> dict[str, str]:
    """Return an id per name that is valid in HTML and in a link: "runs-adamw"."""
    groups: dict[str, str] = {}
    for name in names:
        plain = re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-")
        group, number = f"runs-{plain}", 2
        while group in groups.values():
            group, number = f"runs-{plain}-{number}", number + 1
        groups[name] = group
    return groups
