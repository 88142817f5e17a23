"""What kron does once in a hundred updates, which the other comparisons are too short for."""

from __future__ import annotations

import harness
import problems
import torch
from harness import Case, Followed
from measured import displacement_error

from steepest.optim.rules import psgd


def test_balanced_factors() -> None:
    shapes = ((6, 5), (5, 8))
    case = Case("kron", {"lr": 1e-3, "precond_lr": 0.3})
    params = problems.parameters(torch.float64, shapes)
    optimizer = harness.make(case, problems.with_roles(params), 0.1, torch.float64)
    start = harness.snapshot(params)
    followed = Followed(case, optimizer)
    for step, grads in enumerate(problems.stream(2 * psgd.BALANCE + 3, shapes), start=1):
        problems.set_gradients(params, grads)
        followed.read_lrs()
        before = [largest(optimizer.state[p]) for p in params] if step > 1 else []
        optimizer.step()
        followed.step(dict(zip(params, grads, strict=True)))
        if step == psgd.BALANCE:
            # They were a seventh apart; the update that follows brings a part of that back.
            after = [largest(optimizer.state[p]) for p in params]
            assert max(before[0]) > 1.1 * min(before[0])
            assert max(after[0]) < 1.05 * min(after[0])
    values = followed.values()
    pairs = [(p.detach().numpy(), values[p], start[p]) for p in params]
    assert displacement_error(*map(list, zip(*pairs, strict=True))) < 1e-9  # type: ignore[arg-type]


def largest(state: dict[str, torch.Tensor]) -> tuple[float, float]:
    return float(state["factor_left"].abs().max()), float(state["factor_right"].abs().max())


def test_updates_are_counted_not_drawn() -> None:
    counts = psgd.Counts(1.0, 0.25, 0.1, 5)
    at = [step for step in range(1, 60) if counts.upto(step) > counts.upto(step - 1)]
    assert at[:6] == [1, 2, 3, 4, 5, 6]
    assert {b - a for a, b in zip(at[-5:], at[-4:], strict=False)} == {4}
    assert psgd.Counts(0.0, 0.0, 0.0, 0).upto(100) == 0
