"""Numbers as text, and the leaderboard's columns: written once for HTML, terminal and Markdown."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # scipy, which it needs, takes long to import
    from steepest.analysis import Estimate, Row

MINUS = "\u2212"
NONE = "–"


@dataclass(frozen=True)
class Cell:
    """What a table shows: the number, what goes with it, and the key that it sorts by."""

    text: str
    detail: str = ""
    sort: float | str | None = None
    warn: bool = False
    """Whether the detail is a warning."""

    def __str__(self) -> str:
        return f"{self.text} {self.detail}".strip()


@dataclass(frozen=True)
class Column:
    """A column of the leaderboard. `short` is the title where there is little room."""

    title: str
    short: str
    help: str
    cell: Callable[[Row], Cell]
    numeric: bool = True
    cost: bool = False
    """Whether it tells what the optimizer takes rather than what it reaches."""


def columns(baseline: str) -> tuple[Column, ...]:
    """Return the leaderboard's columns; `baseline` is named in their titles."""
    return (
        Column(
            "Rank",
            "#",
            "By mean final loss. An optimizer shares the rank of the leader above it when the 95 % "
            "interval of their paired difference contains 0.",
            lambda row: Cell(row.rank_label, sort=row.rank),
        ),
        Column("Optimizer", "optimizer", "", _optimizer, numeric=False),
        Column(
            "Learning rate",
            "lr",
            "The best of those tried, used for the final runs; marked if at their edge.",
            _learning_rate,
        ),
        Column(
            "Validation loss",
            "val loss",
            "Mean final loss in nats per token, with its 95 % interval over seeds.",
            _loss,
        ),
        Column(
            f"Loss vs {baseline}",
            f"vs {baseline}",
            "Mean difference of final losses, paired by seed, with its 95 % interval. Negative is "
            "better.",
            _difference,
        ),
        Column("Perplexity", "ppl", "exp of the mean validation loss.", _perplexity),
        Column(
            f"Tokens to {baseline}’s loss",
            "tokens to",
            f"Training tokens until its mean curve reaches {baseline}’s mean final loss, and how "
            f"many times fewer that is than {baseline} itself takes.",
            lambda row: _target(row, row.tokens_to_baseline, row.token_speedup, count),
            cost=True,
        ),
        Column(
            f"Time to {baseline}’s loss",
            "time to",
            f"The same in training time, and how many times faster than {baseline}.",
            lambda row: _target(row, row.seconds_to_baseline, row.time_speedup, duration),
            cost=True,
        ),
        Column(
            "Step time",
            "step",
            "Median wall time of a whole training step.",
            lambda row: _milliseconds(row.step_ms),
            cost=True,
        ),
        Column(
            "Optimizer time",
            "opt.",
            "Median time of the optimizer’s part of a step.",
            lambda row: _milliseconds(row.optimizer_ms),
            cost=True,
        ),
        Column(
            "State per parameter",
            "state",
            "What the optimizer keeps in memory, in bytes per model parameter and in all.",
            _memory,
            cost=True,
        ),
        Column("Diverged", "diverged", "Final runs that diverged, of all.", _diverged),
    )


def _optimizer(row: Row) -> Cell:
    return Cell(row.optimizer, "baseline" if row.is_baseline else "", sort=row.optimizer.casefold())


def _learning_rate(row: Row) -> Cell:
    if row.best_lr is None:
        return Cell(NONE)
    edge = {"": "", "low": "low edge", "high": "high edge", "only": "one tried"}
    return Cell(learning_rate(row.best_lr), edge[row.lr_at_edge], row.best_lr, bool(row.lr_at_edge))


def _loss(row: Row) -> Cell:
    if row.val_loss is None:
        return Cell(NONE)
    text, detail = estimate(row.val_loss)
    return Cell(text, detail, row.val_loss.mean)


def _difference(row: Row) -> Cell:
    if row.difference is None:
        return Cell(NONE, sort=0.0 if row.is_baseline and row.runs else None)
    text, detail = estimate(row.difference, sign=True)
    return Cell(text, detail, row.difference.mean)


def _perplexity(row: Row) -> Cell:
    if row.perplexity is None or row.val_loss is None:
        return Cell(NONE)
    half = row.val_loss.half_width
    digits = decimals(None if half is None else row.perplexity * half, unknown=2)
    return Cell(f"{row.perplexity:.{digits}f}", sort=row.perplexity)


def _target(
    row: Row, value: float | None, ratio: float | None, show: Callable[[float], str]
) -> Cell:
    if value is None:
        return Cell("never" if row.val_loss is not None else NONE)
    return Cell(show(value), "" if ratio is None else f"{ratio:.2f}×", value)


def _milliseconds(value: float | None) -> Cell:
    return Cell(NONE) if value is None else Cell(f"{significant(value)} ms", sort=value)


def _memory(row: Row) -> Cell:
    if row.state_bytes is None or row.state_bytes_per_parameter is None:
        return Cell(NONE)
    per_parameter = row.state_bytes_per_parameter
    return Cell(f"{per_parameter:.2f} B", mebibytes(row.state_bytes), per_parameter)


def _diverged(row: Row) -> Cell:
    return Cell(f"{row.diverged} of {row.runs}", sort=row.diverged, warn=row.diverged > 0)


def estimate(value: Estimate, *, sign: bool = False) -> tuple[str, str]:
    """Return the mean and "± half width", both rounded to what the half width can tell.

    >>> estimate(Estimate(3.34159, 0.0123, 3))
    ('3.342', '± 0.012')
    """
    digits = decimals(value.half_width)
    text = f"{value.mean:{'+' if sign else ''}.{digits}f}".replace("-", MINUS)
    return text, "± ?" if value.half_width is None else f"± {value.half_width:.{digits}f}"


def decimals(half_width: float | None, *, unknown: int = 3) -> int:
    """Return the decimals worth showing, at least 1 and at most 4.

    They are those of a half width with two digits if it starts with 1 or 2, else with one;
    `unknown` if there is no interval, 4 if it has no width.
    """
    if half_width is None or not math.isfinite(half_width):
        return unknown
    if half_width <= 0:
        return 4
    exponent = math.floor(math.log10(half_width))
    digits = -exponent + (1 if half_width < 3 * 10.0**exponent else 0)
    return min(max(digits, 1), 4)


def significant(value: float, digits: int = 3) -> str:
    """Return `value` with `digits` significant digits, never in scientific notation.

    >>> significant(1234.5), significant(24.04), significant(0.01234)
    ('1,234', '24.0', '0.0123')
    """
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    exponent = math.floor(math.log10(abs(float(f"{value:.{digits - 1}e}"))))
    return f"{value:,.{max(digits - 1 - exponent, 0)}f}"


def learning_rate(value: float) -> str:
    """Return a learning rate with up to three significant digits: 0.02, 0.0003, 3e-05."""
    return f"{value:.3g}"


def count(value: float) -> str:
    """Return a number of tokens or parameters: 614, 61.4 k, 1.23 M, 20.0 B."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if round(value) >= size:
            return f"{significant(value / size)} {unit}"
    return str(round(value))


def duration(seconds: float) -> str:
    """Return a time: 16.0 s, 3.2 min, 2.5 h."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    if seconds < 7200:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"


def mebibytes(value: float) -> str:
    """Return bytes in MiB."""
    return f"{significant(value / 2**20, 2)} MiB"


def plain(value: object) -> str:
    """Return a protocol or environment value: numbers with thousands separators, None as a dash."""
    if value is None:
        return NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def plural(number: int, noun: str) -> str:
    """Return "1 seed", "3 seeds"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def listed(names: list[str]) -> str:
    """Return "a", "a and b", "a, b and c"."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
