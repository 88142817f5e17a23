"""What a race can and cannot tell, made from its facts."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from statistics import median
from typing import Any

from steepest.analysis import Row, Run
from steepest.report import formatting
from steepest.report.findings import Findings
from steepest.report.formatting import count, listed, plural

HARDWARE = ("cpu", "gpu", "device", "threads")
"""Keys of environment.json that training time depends on."""
SOFTWARE = ("steepest", "git_commit", "torch")
"""Keys of environment.json that a loss may depend on."""
COMPUTE_OPTIMAL = 20
"""Tokens per parameter at which a model's compute is best spent (Hoffmann et al., 2022)."""
TARGETS = (
    "These are read off the curves of full-length runs. Under a schedule that decays the learning "
    "rate, a run planned to end at that point would reach a lower loss there, so the ratios lean "
    "to the low side for the optimizers that are ahead."
)


def warnings(findings: Findings) -> list[str]:
    """Return what is amiss with the race, a sentence each; none if all is well."""
    return [
        *_few_seeds(findings),
        *_edges(findings.rows),
        *_diverged(findings.rows),
        *_unfinished(findings),
        *_unequal(findings),
        *_reused_seeds(findings),
        *_mixed_hardware(findings),
        *_mixed_software(findings),
        *_noted_by_runs(findings),
    ]


def _few_seeds(findings: Findings) -> Iterable[str]:
    if findings.ranked and len(findings.seeds) == 1:
        yield (
            "There is one seed: differences have no interval, so no optimizer can be told from "
            "another and all share a rank. Add seeds."
        )
    missing = [name for name in findings.names if name not in findings.finals]
    if findings.ranked and missing:
        yield f"Without a complete final run, and so without a rank: {listed(missing)}."


def _edges(rows: list[Row]) -> Iterable[str]:
    text = {
        "high": "the highest learning rate tried: higher ones may be better",
        "low": "the lowest learning rate tried: lower ones may be better",
        "only": "the only learning rate tried: others may be better",
    }
    for side, meaning in text.items():
        names = [
            f"{row.optimizer} ({formatting.learning_rate(row.best_lr)})"
            for row in rows
            if row.lr_at_edge == side and row.best_lr is not None
        ]
        if names:
            yield f"Best at {meaning}. This concerns {listed(names)}."


def _diverged(rows: list[Row]) -> Iterable[str]:
    names = [f"{r.optimizer} ({r.diverged} of {r.runs})" for r in rows if r.diverged]
    if names:
        yield (
            f"Final runs diverged, and their optimizers rank below the others: {listed(names)}. "
            "Their losses are means over the seeds that finished."
        )


def _unfinished(findings: Findings) -> Iterable[str]:
    unfinished = findings.race.unfinished
    if unfinished:
        yield f"{plural(len(unfinished), 'run')} without a result yet, left out of the ranking."


def _unequal(findings: Findings) -> Iterable[str]:
    runs = [run for run in findings.race.final_runs if run.finished]
    if len({(run.tokens, run.parameters) for run in runs}) > 1:
        yield "The final runs differ in tokens or parameters, so their losses do not compare."


def _reused_seeds(findings: Findings) -> Iterable[str]:
    reused = sorted({run.seed for run in findings.race.tuning_runs} & set(findings.seeds))
    if reused:
        yield (
            f"{'Seeds' if len(reused) > 1 else 'Seed'} {listed([str(s) for s in reused])} chose "
            "the learning rates too, so the final losses lean towards luck."
        )


def _mixed_hardware(findings: Findings) -> Iterable[str]:
    kinds = _kinds(findings, HARDWARE)
    if kinds > 1:
        yield f"The runs were made on {kinds} kinds of hardware: their times do not compare."


def _mixed_software(findings: Findings) -> Iterable[str]:
    kinds = _kinds(findings, SOFTWARE)
    if kinds > 1:
        yield (
            f"The runs were made by {kinds} versions of steepest or torch, which may differ in "
            "more than the optimizer: race again in a new directory to be sure."
        )


def _kinds(findings: Findings, keys: tuple[str, ...]) -> int:
    environments = [
        environment for environment in findings.race.environments.values() if environment
    ]
    return len({tuple(str(environment.get(key)) for key in keys) for environment in environments})


def _noted_by_runs(findings: Findings) -> Iterable[str]:
    noted = [run for run in findings.race.runs.values() if run.warnings]
    if noted:
        hashes = listed([run.hash for run in noted[:3]]) if len(noted) <= 3 else ""
        where = f" ({hashes})" if hashes else ""
        yield f"{plural(len(noted), 'run')}{where} noted warnings; see the table of runs."


def limits(findings: Findings) -> list[tuple[str, str]]:
    """Return pairs (topic, text) on how far the results carry."""
    runs = [run for run in findings.race.final_runs if run.finished]
    if not runs:
        return []
    return [
        ("Seeds", _seeds(findings)),
        ("Gaps", _gaps(findings)),
        ("Tuning", _tuning(findings)),
        ("Tokens to reach a loss", TARGETS),
        ("Scale", _scale(runs)),
        ("Time and memory", _time(findings.race.environments.values())),
    ]


def _seeds(findings: Findings) -> str:
    number = len(findings.seeds)
    if number == 1:
        return (
            "Every optimizer ran with one seed. Another seed can change the order, and by how much "
            "is unknown."
        )
    return (
        f"Final losses are means over {plural(number, 'seed')}. The same seed gives every "
        "optimizer the same initial weights and the same batches in the same order, so differences "
        "are taken seed by seed; their 95 % intervals are Student-t. Each stands for itself: every "
        f"one of the {plural(max(len(findings.ranked) - 1, 1), 'comparison')} with the baseline "
        "has one chance in twenty to miss."
    )


def _gaps(findings: Findings) -> str:
    widths = [
        row.difference.half_width
        for row in findings.ranked
        if row.difference is not None and row.difference.half_width is not None
    ]
    if not widths:
        return "No difference has an interval, so no gap in the table is known to be real."
    digits = formatting.decimals(median(widths))
    text = (
        f"A difference from {findings.race.baseline} is known to ± {median(widths):.{digits}f} "
        f"nats (median; {min(widths):.{digits}f} to {max(widths):.{digits}f})."
    )
    losses = sorted(row.val_loss.mean for row in findings.ranked if row.val_loss is not None)
    gaps = [after - before for before, after in pairwise(losses)]
    close = sum(gap < median(widths) for gap in gaps)
    return (
        f"{text} Of the {plural(len(gaps), 'gap')} between neighbours in the table, {close} "
        f"{'is' if close == 1 else 'are'} smaller than that."
    )


def _tuning(findings: Findings) -> str:
    tried = {name: {p.lr for p in curve.points} for name, curve in findings.curves.items()}
    if not tried:
        return "Nothing was tuned for this race: each optimizer ran at the learning rate given."
    numbers = sorted({len(lrs) for lrs in tried.values()})
    each = " to ".join(str(number) for number in dict.fromkeys((numbers[0], numbers[-1])))
    text = (
        f"Only the learning rate was tuned, over {each} values per optimizer; every other "
        "hyperparameter is as given."
    )
    steps = [b / a for lrs in tried.values() for a, b in pairwise(sorted(lrs))]
    if steps:
        text += f" Neighbouring values are a factor of {median(steps):.2g} apart (median)"
        text += ", so the best is known to about that factor."
    if any(row.lr_at_edge for row in findings.rows):
        return text + " Some best values lie at the edge of what was tried (see the warnings)."
    return text + " No best value lies at the edge of what was tried."


def _scale(runs: list[Run]) -> str:
    run = max(runs, key=lambda run: run.tokens)
    ratio = run.tokens / run.parameters
    return (
        f"{count(run.parameters)} parameters, {run.steps:,} steps of "
        f"{count(run.tokens / max(run.steps, 1))} tokens, {count(run.tokens)} tokens in all: "
        f"{formatting.significant(ratio, 2 if ratio < 100 else 3)} tokens per parameter "
        f"(about {COMPUTE_OPTIMAL} are compute-optimal). A ranking at this scale does not carry "
        "over to larger models, other batch sizes or longer training by itself: tuned comparisons "
        "found matrix optimizers 1.4× faster than AdamW at 0.1 B parameters and 1.1× at 1.2 B "
        "(Wen et al., 2025, arXiv:2509.02046)."
    )


def _time(environments: Iterable[dict[str, Any]]) -> str:
    names = sorted({str(e.get("gpu") or e.get("cpu")) for e in environments if e})
    where = f" on {listed(names)}" if names else ""
    return (
        f"Step and optimizer times were measured{where} at this model size, and say little of "
        "others: in larger models and batches the optimizer’s part of a step shrinks. State memory "
        "per parameter carries over where the shapes of the parameters do."
    )
