"""Each optimizer against a float64 transcription of its paper, over 32 steps.

Errors are of displacements, ||(p - p0) - (q - q0)|| / ||q - q0||, of the worst tensor after the
last step.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Sequence

import cases
import harness
import numpy as np
import problems
import pytest
import torch
from harness import TOKENS, Case, Followed
from measured import displacement_error, record
from references import all_references, find
from references.base import Array
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

import steepest
from steepest.models import Llama, document_attention

STEPS = 32
CASES: list[Case] = [
    case
    for module in pkgutil.iter_modules(cases.__path__)
    for case in importlib.import_module(f"cases.{module.name}").CASES
]
Schedule = Callable[[int], float]
WAYS = [(problems.constant, True), (problems.cosine, False)]
OTHER_WAYS = [(problems.constant, False), (problems.cosine, True)]
IDS = ["constant, decay", "cosine"]
OTHER_IDS = ["constant", "cosine, decay"]


def test_every_optimizer_has_a_reference_and_a_case() -> None:
    assert set(steepest.names()) <= set(all_references())
    assert set(steepest.names()) == {case.name for case in CASES if not case.wrap}


@pytest.mark.parametrize("name", steepest.names())
def test_defaults_are_those_of_the_reference(name: str) -> None:
    ours = steepest.describe(name).hyperparameters
    for key, parameter in inspect.signature(find(name).setup).parameters.items():
        if key != "self" and key in ours:
            assert ours[key][0] == parameter.default, key


@pytest.mark.parametrize("case", CASES, ids=str)
def test_larger_tolerances_have_a_reason(case: Case) -> None:
    assert case.reason or (case.tolerance32 <= 1e-5 and case.tolerance64 <= 1e-9)


@pytest.fixture
def exact_llama(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep a float64 LLaMA in float64: it casts norms, attention and logits to float32, whose
    rounding makes the gradient jump by 1e-7 at differences of 1e-16."""
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    monkeypatch.setattr(document_attention, "FLOAT32_LENGTH", 0)


@pytest.mark.usefixtures("exact_llama")
@pytest.mark.parametrize(("schedule", "decays"), WAYS, ids=IDS)
@pytest.mark.parametrize("case", [c for c in CASES if c.model], ids=str)
def test_two_models_trained_side_by_side(case: Case, schedule: Schedule, decays: bool) -> None:
    # Closed loop in float64: every side differentiates its own weights.
    ours, theirs = problems.llama(torch.float64), problems.llama(torch.float64)
    mine, yours = list(ours.parameters()), list(theirs.parameters())
    optimizer = harness.make(case, ours, case.decay * decays, torch.float64)
    scheduler = LambdaLR(optimizer, schedule)
    start = harness.snapshot(mine)
    followed = Followed(case, optimizer)
    data = problems.batches()
    for step in range(STEPS):
        batch = data[step % len(data)]
        followed.read_lrs()
        extra(followed, ours, data, step)
        problems.backward(ours, batch)
        problems.backward(theirs, batch)
        optimizer.step()
        scheduler.step()
        followed.step({p: gradient(q) for p, q in zip(mine, yours, strict=True)})
        values = followed.values()
        with torch.no_grad():
            for p, q in zip(mine, yours, strict=True):
                q.copy_(torch.from_numpy(values[p]))
    compare(followed, start, "float64, LLaMA, closed loop")


@pytest.mark.parametrize(("schedule", "decays"), OTHER_WAYS, ids=OTHER_IDS)
@pytest.mark.parametrize("case", [c for c in CASES if c.model], ids=str)
def test_float32_llama(case: Case, schedule: Schedule, decays: bool) -> None:
    # Open loop: the reference gets the gradients of our weights, for its own float64 weights.
    model = problems.llama()
    params = list(model.parameters())
    optimizer = harness.make(case, model, case.decay * decays, torch.float32)
    scheduler = LambdaLR(optimizer, schedule)
    start = harness.snapshot(params)
    followed = Followed(case, optimizer)
    data = problems.batches()
    for step in range(STEPS):
        followed.read_lrs()
        extra(followed, model, data, step)
        problems.backward(model, data[step % len(data)])
        grads = {p: gradient(p).clone() for p in params}
        optimizer.step()
        scheduler.step()
        followed.step(grads)
    compare(followed, start, "float32, LLaMA, given gradients")


def extra(
    followed: Followed,
    model: Llama,
    data: Sequence[tuple[Tensor, Tensor]],
    step: int,
) -> None:
    """Give both sides the extra gradient that the optimizer wants before this step."""
    optimizer = followed.optimizer
    params = list(model.parameters())
    wanted = optimizer.wants()
    if "previous_weights" in wanted:
        with optimizer.previous_weights():
            problems.backward(model, data[step % len(data)])
    elif wanted:  # Labels that a model might sample are those of another batch.
        problems.backward(model, data[(step + 1) % len(data)])
    else:
        return
    followed.observe(
        [p.grad.clone() if p.grad is not None else None for p in params], params, TOKENS
    )
    optimizer.observe(batch_tokens=TOKENS)


def gradient(p: Tensor) -> Tensor:
    assert p.grad is not None
    return p.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_fixed_gradients_of_every_shape(case: Case, dtype: torch.dtype) -> None:
    shapes = case.shapes or problems.SHAPES
    params: list[Tensor] = list(problems.parameters(dtype, shapes))
    optimizer = harness.make(case, problems.with_roles(params), case.decay, dtype)
    scheduler = LambdaLR(optimizer, problems.cosine)
    start = harness.snapshot(params)
    followed = Followed(case, optimizer)
    for grads, others in zip(
        problems.stream(STEPS, shapes), problems.stream(STEPS, shapes, seed=8), strict=True
    ):
        followed.read_lrs()
        if optimizer.wants():
            followed.observe(others, params, TOKENS)
            problems.set_gradients(params, others)
            optimizer.observe(batch_tokens=TOKENS)
        problems.set_gradients(params, grads)
        optimizer.step()
        scheduler.step()
        followed.step(dict(zip(params, grads, strict=True)))
    precision = str(dtype).removeprefix("torch.")
    compare(followed, start, f"{precision}, fixed gradients")


def compare(followed: Followed, start: dict[Tensor, Array], comparison: str) -> None:
    """Compare displacements, and those of the evaluation weights where they are others."""
    measure(followed, followed.values(), start, comparison)
    if any(rule.averages for rule in followed.optimizer.rules.values()):
        followed.optimizer.eval()
        measure(followed, followed.averages(), start, f"{comparison}, evaluation weights")
        followed.optimizer.train()


def measure(
    followed: Followed, values: dict[Tensor, Array], start: dict[Tensor, Array], comparison: str
) -> None:
    """Record and check the error; of sign methods only over elements whose signs were decidable."""
    case, margins = followed.case, followed.margins()
    wide = comparison.startswith("float64")
    ours, theirs, before = [], [], []
    undecided = total = 0
    for p, x in values.items():
        keep = np.ones(tuple(p.shape), dtype=bool)
        if p in margins:
            keep = margins[p] > (1e-13 if wide else case.margin32)
        undecided += int((~keep).sum())
        total += keep.size
        ours.append(p.detach().double().numpy()[keep])
        theirs.append(x[keep])
        before.append(start[p][keep])
    assert undecided <= 0.003 * total
    # A sign method rounds the same way at every step: those errors add up linearly.
    roundings = 0 if wide else STEPS**2 if margins else STEPS
    tolerance = case.tolerance64 if wide else case.tolerance32
    error = displacement_error(ours, theirs, before, roundings)
    assert record(str(case), comparison, error, case.reason) < tolerance
