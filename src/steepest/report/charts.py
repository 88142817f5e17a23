"""The report's charts, as what plotly.js draws.

Colors are CSS variables of the page ("var(--s0)", "var(--s0)/0.2" with opacity); the page's script
puts in their values, so that charts follow its light and dark theme. Each point carries the anchor
that a click on it goes to, and its hover text.
"""

from __future__ import annotations

import html
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from steepest.analysis import LrCurve, MeanEvaluation, Row, mean_curve
from steepest.report import formatting
from steepest.report.findings import Findings
from steepest.report.styles import Style

Trace = dict[str, Any]

SHOWN_FROM = 0.12
"""Part of the training that the loss axis leaves out: it would flatten the rest."""
LEGEND = 28
"""Most characters of a name in a legend. Long ones are paths, of which the end tells most."""


@dataclass(frozen=True)
class Chart:
    """A chart: `id` in the page, title, a line on how to read it, and plotly's data and layout."""

    id: str
    title: str
    caption: str
    data: list[Trace]
    layout: dict[str, Any]
    wide: bool = False


def charts(findings: Findings, styles: dict[str, Style]) -> list[Chart]:
    """Return the charts that the race has data for."""
    made = []
    if findings.ranked:
        made += [_against_tokens(findings, styles)]
    if findings.curves:
        made += [_sensitivity(findings, styles)]
    if findings.ranked:
        made += [
            _against_time(findings, styles),
            _against_cost(
                findings,
                styles,
                lambda row: row.state_bytes_per_parameter,
                chart_id="memory",
                title="Loss against optimizer memory",
                x_axis={
                    "title": {"text": "Optimizer state, bytes per parameter"},
                    "rangemode": "tozero",
                },
            ),
            _against_cost(
                findings,
                styles,
                lambda row: row.step_ms,
                chart_id="step-time",
                title="Loss against step time",
                x_axis={"title": {"text": "Training step, ms"}},
            ),
        ]
    return made


def _against_tokens(findings: Findings, styles: dict[str, Style]) -> Chart:
    traces = []
    for name, curve in _curves(findings):
        traces += _band(curve, name, styles[name])
        traces.append(_mean_line(curve, name, styles[name], findings, lambda e: e.tokens))
    return Chart(
        "loss-tokens",
        "Validation loss against tokens",
        "Mean over seeds; the band spans the lowest and the highest seed. The dotted line is the "
        "baseline’s final loss. Double-click to see the beginning of training.",
        traces,
        _loss_layout(findings, "Training tokens", tickformat="~s"),
        wide=True,
    )


def _against_time(findings: Findings, styles: dict[str, Style]) -> Chart:
    return Chart(
        "loss-time",
        "Validation loss against training time",
        "Mean over seeds, without evaluation and compilation. A line ends where training ended.",
        [
            _mean_line(curve, name, styles[name], findings, lambda e: e.seconds)
            for name, curve in _curves(findings)
        ],
        _loss_layout(findings, "Training time, s"),
    )


def _curves(findings: Findings) -> list[tuple[str, tuple[MeanEvaluation, ...]]]:
    curves = [
        (row.optimizer, mean_curve(findings.finals[row.optimizer])) for row in findings.ranked
    ]
    return [(name, curve) for name, curve in curves if curve]


def _mean_line(
    curve: tuple[MeanEvaluation, ...],
    name: str,
    style: Style,
    findings: Findings,
    x: Callable[[MeanEvaluation], float],
) -> Trace:
    hashes = " ".join(run.hash for run in findings.finals[name] if run.finished)
    return {
        **_trace(name),
        "mode": "lines",
        "x": [x(e) for e in curve],
        "y": [e.val_loss for e in curve],
        "line": {"color": style.color, "width": style.width, "dash": style.dash},
        "customdata": [
            _point(
                style.group,
                name,
                f"loss {e.val_loss:.3f} ({e.lowest:.3f} to {e.highest:.3f})",
                f"step {e.step:,}, {formatting.count(e.tokens)} tokens, "
                f"{formatting.duration(e.seconds)}",
                f"runs {hashes}",
            )
            for e in curve
        ],
    }


def _band(curve: tuple[MeanEvaluation, ...], name: str, style: Style) -> list[Trace]:
    tokens = [e.tokens for e in curve]
    return [
        {
            "type": "scatter",
            "mode": "lines",
            "legendgroup": name,
            "showlegend": False,
            "hoverinfo": "skip",
            "x": tokens + tokens[::-1],
            "y": [e.highest for e in curve] + [e.lowest for e in reversed(curve)],
            "fill": "toself",
            "fillcolor": f"{style.color}/0.18",
            "line": {"width": 0, "color": f"{style.color}/0"},
        }
    ]


def _loss_layout(findings: Findings, x_title: str, **x_axis: Any) -> dict[str, Any]:
    shown = [curve for _, curve in _curves(findings)]
    lowest = min(e.lowest for curve in shown for e in curve)
    starts = sorted(_loss_at(curve, SHOWN_FROM) for curve in shown)
    finals = max(curve[-1].highest for curve in shown)
    top = max(starts[len(starts) // 2], finals)
    margin = 0.04 * (top - lowest)
    layout: dict[str, Any] = {
        "xaxis": {"title": {"text": x_title}, "rangemode": "tozero", **x_axis},
        "yaxis": {"title": {"text": "Loss, nats per token"}},
    }
    if top > lowest:
        layout["yaxis"]["range"] = [lowest - margin, top + margin]
    baseline = findings.row(findings.race.baseline)
    if baseline is not None and baseline.val_loss is not None:
        loss = baseline.val_loss.mean
        line = {"color": "var(--baseline)", "width": 1, "dash": "dot"}
        place = {"xref": "paper", "x0": 0, "x1": 1, "y0": loss, "y1": loss}
        layout["shapes"] = [{"type": "line", "layer": "below", "line": line, **place}]
    return layout


def _loss_at(curve: tuple[MeanEvaluation, ...], fraction: float) -> float:
    return next(e.val_loss for e in curve if e.tokens >= fraction * curve[-1].tokens)


def _sensitivity(findings: Findings, styles: dict[str, Style]) -> Chart:
    losses = [p.loss for c in findings.curves.values() for p in c.points if p.loss is not None]
    low, high = (min(losses), max(losses)) if losses else (0.0, 1.0)
    top = high + 0.08 * ((high - low) or 1.0)
    traces = []
    for name, curve in findings.curves.items():
        traces += _sensitivity_traces(name, curve, styles[name], top)
    return Chart(
        "sensitivity",
        "Sensitivity to the learning rate",
        "Final loss of each tuning run. Larger marks are the best; crosses at the top diverged.",
        traces,
        {
            "xaxis": {
                "title": {"text": "Learning rate"},
                "type": "log",
                "dtick": 1,
                "tickformat": "~g",
            },
            "yaxis": {"title": {"text": "Final loss, nats per token"}},
        },
    )


def _sensitivity_traces(name: str, curve: LrCurve, style: Style, top: float) -> list[Trace]:
    finished = [p for p in curve.points if p.loss is not None]
    diverged = [p for p in curve.points if p.loss is None]
    sizes = [11 if p.lr == curve.best_lr else 7 for p in finished]
    line = {
        **_trace(name),
        "mode": "lines+markers",
        "x": [p.lr for p in finished],
        "y": [p.loss for p in finished],
        "line": {"color": style.color, "width": style.width, "dash": style.dash},
        "marker": {"color": style.color, "size": sizes, "symbol": style.symbol},
        "customdata": [
            _point(
                f"run-{p.hash}",
                name,
                f"lr {formatting.learning_rate(p.lr)}: loss {p.loss:.3f}",
                f"run {p.hash}",
            )
            for p in finished
        ],
    }
    crosses = {
        **_trace(name),
        "showlegend": not finished,
        "mode": "markers",
        "x": [p.lr for p in diverged],
        "y": [top] * len(diverged),
        "marker": {"color": style.color, "size": 9, "symbol": "x-thin", "line": _outline(style)},
        "customdata": [
            _point(
                f"run-{p.hash}",
                name,
                f"lr {formatting.learning_rate(p.lr)}: diverged",
                f"run {p.hash}",
            )
            for p in diverged
        ],
    }
    return [trace for trace in (line, crosses) if trace["x"]]


def _outline(style: Style) -> dict[str, Any]:
    return {"color": style.color, "width": 2}


def _against_cost(
    findings: Findings,
    styles: dict[str, Style],
    cost: Callable[[Row], float | None],
    *,
    chart_id: str,
    title: str,
    x_axis: dict[str, Any],
) -> Chart:
    rows = [row for row in findings.ranked if cost(row) is not None]
    return Chart(
        chart_id,
        title,
        "Mean final loss with its 95 % interval. Better is lower and further left.",
        [_cost_trace(row, cost(row) or 0.0, styles[row.optimizer]) for row in rows],
        {
            "xaxis": x_axis,
            "yaxis": {"title": {"text": "Final loss, nats per token"}},
        },
    )


def _cost_trace(row: Row, cost: float, style: Style) -> Trace:
    assert row.val_loss is not None
    loss, interval = formatting.estimate(row.val_loss)
    error = {"type": "data", "array": [row.val_loss.half_width or 0], "thickness": 1.2, "width": 3}
    return {
        **_trace(row.optimizer),
        "mode": "markers",
        "x": [cost],
        "y": [row.val_loss.mean],
        "error_y": {**error, "color": f"{style.color}/0.6"},
        "marker": {"color": style.color, "size": 10, "symbol": style.symbol},
        "customdata": [
            _point(
                style.group,
                row.optimizer,
                f"loss {loss} {interval}",
                f"at {formatting.significant(cost)}",
                f"runs {' '.join(row.hashes)}",
            )
        ],
    }


def _trace(name: str) -> Trace:
    return {
        "type": "scatter",
        "name": html.escape(name if len(name) <= LEGEND else f"…{name[1 - LEGEND :]}"),
        "legendgroup": name,
        "hovertemplate": "%{customdata[1]}<extra></extra>",
    }


def _point(anchor: str, name: str, *lines: str) -> list[str]:
    """Return where a click on the point goes, and its hover text in plotly's subset of HTML."""
    return [anchor, "<br>".join([f"<b>{html.escape(name)}</b>", *map(html.escape, lines)])]
