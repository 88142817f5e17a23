"""The answer in a sentence, made from the leaderboard."""

from __future__ import annotations

from dataclasses import replace

from steepest.analysis import Row
from steepest.report import formatting
from steepest.report.findings import Findings

NAMED = 3
"""Tied optimizers that the headline names; more are counted."""


def headline(findings: Findings) -> str:
    """Return who is first, by how much, and how sure that is."""
    leaders, baseline = findings.leaders, findings.race.baseline
    if not leaders:
        return "No final run has finished yet, so there is no ranking."
    best = leaders[0]
    if not _tested(findings):
        return _untested(best, findings)
    if len(leaders) == 1:
        return _single(best, findings)
    names = [row.optimizer for row in leaders]
    who = formatting.listed(names) if len(names) <= NAMED else f"{len(names)} optimizers"
    if baseline in names:
        better = [row.optimizer for row in findings.ranked if _shown_below(row)]
        if not better:
            return f"No optimizer is shown to beat {baseline}: {who} are tied for first."
        which = f"{formatting.listed(better)} {'is' if len(better) == 1 else 'are'}"
        return f"{who} are tied for first, but {which} shown to be below {baseline}."
    return f"{who} are tied for first, {_below(leaders, baseline)}."


def details(findings: Findings) -> list[str]:
    """Return sentences on what the best optimizer saves, and what it costs."""
    best = findings.leaders[0] if findings.leaders else None
    base = findings.row(findings.race.baseline)
    if best is None or base is None or best is base or base.val_loss is None:
        return []
    sentences = []
    if best.token_speedup is not None and best.tokens_to_baseline is not None:
        sentence = (
            f"{best.optimizer} reaches {base.optimizer}’s final loss after "
            f"{formatting.count(best.tokens_to_baseline)} tokens, {best.token_speedup:.2f}× fewer"
        )
        if best.time_speedup is not None:
            slower = best.time_speedup < 1
            factor = 1 / best.time_speedup if slower else best.time_speedup
            sentence += f", and in {factor:.2f}× {'more' if slower else 'less'} time"
        sentences.append(sentence + ".")
    ours, theirs = best.state_bytes_per_parameter, base.state_bytes_per_parameter
    if ours is not None and theirs is not None and best.step_ms and base.step_ms:
        sentences.append(
            f"A step takes {formatting.significant(best.step_ms)} ms "
            f"({base.optimizer} {formatting.significant(base.step_ms)} ms), its state "
            f"{ours:.2f} bytes per parameter ({base.optimizer} {theirs:.2f})."
        )
    return sentences


def _tested(findings: Findings) -> bool:
    """Whether any two optimizers share enough seeds for an interval."""
    return any(
        row.difference is not None and row.difference.half_width is not None
        for row in findings.ranked
    ) or any(row.rank != 1 for row in findings.ranked)


def _shown_below(row: Row) -> bool:
    return row.difference is not None and row.difference.mean < 0 and not row.difference.may_be_zero


def _untested(best: Row, findings: Findings) -> str:
    if len(findings.ranked) == 1:
        return f"Only {best.optimizer} has a final loss, so there is nothing to compare it with."
    few = "one seed cannot tell" if len(findings.seeds) == 1 else "too few shared seeds tell"
    return f"{best.optimizer} has the lowest loss{_by(best)}, but {few} a difference from noise."


def _by(row: Row) -> str:
    if row.difference is None:
        return ""
    return f", {-row.difference.mean:.3f} nats below the baseline"


def _single(best: Row, findings: Findings) -> str:
    baseline = findings.race.baseline
    if not best.is_baseline:
        return f"{best.optimizer} is first, {_below([best], baseline)}."
    second = next((row for row in findings.ranked if row.rank != 1), None)
    if second is None:
        return f"{baseline}, the baseline, is first."
    if second.difference is None:
        return f"{baseline}, the baseline, is first, ahead of {second.optimizer}."
    text, interval = formatting.estimate(second.difference)
    return (
        f"{baseline}, the baseline, is first, {text} {interval} nats below the next, "
        f"{second.optimizer}."
    )


def _below(leaders: list[Row], baseline: str) -> str:
    """Return "0.08 ± 0.01 nats below adamw", of one leader or from the least to the most."""
    known = [row.difference for row in leaders if row.difference is not None]
    if not known:
        return f"with no run of {baseline} to compare with"
    if any(difference.may_be_zero for difference in known):
        return f"though not shown to differ from {baseline}"
    if len(known) == 1:
        gap, interval = formatting.estimate(replace(known[0], mean=-known[0].mean))
        return f"{gap} {interval} nats below {baseline}"
    widest = max(difference.half_width or 0 for difference in known)
    digits = formatting.decimals(widest)
    means = sorted(-difference.mean for difference in known)
    gaps = [f"{mean:.{digits}f}" for mean in (means[0], means[-1])]
    spread = gaps[0] if gaps[0] == gaps[1] else " to ".join(gaps)
    return f"{spread} (± {widest:.{digits}f}) nats below {baseline}"
