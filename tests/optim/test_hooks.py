"""What rules may ask of the engine beside gradients, with rules made up for the purpose."""

from __future__ import annotations

import copy
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import problems
import pytest
import torch
from engine import assert_same_bits
from torch import Tensor, nn

import steepest
from steepest.errors import UserError
from steepest.optim import Hyper, Rule, State, Wrapper
from steepest.optim.rule import Extra

SHAPES = ((4, 3), (4, 3), (5,), ())


@dataclass(frozen=True)
class Normed(Rule):
    """Divides by the norm of all gradients together."""

    lr: float = 0.1
    elementwise: ClassVar[bool] = True

    def init(self, param: Tensor) -> State:
        return {}

    def shared(self) -> dict[str, float]:
        return {"norm": 0.0, "calls": 0.0}

    def measure(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> dict[str, Tensor]:
        return {"squares": (grad * grad).sum()}

    def combine(self, sums: Mapping[str, Tensor], h: Hyper) -> dict[str, Tensor]:
        return {"norm": sums["squares"].sqrt(), "calls": h.calls + 1}

    def update(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> tuple[Tensor, State]:
        return grad / h.norm * h.calls, {}


@dataclass(frozen=True)
class ByMedian(Rule):
    """Divides by the median of all gradients of matrices, found at every other step."""

    lr: float = 0.1

    def init(self, param: Tensor) -> State:
        return {}

    def shared(self) -> dict[str, float]:
        return {"median": 1.0, "count": 0.0}

    def measures(self, step: int) -> bool:
        return step % 2 == 0

    def measure(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> dict[str, Tensor]:
        found = grad.abs().flatten() if grad.ndim > 1 else grad.new_zeros(0)
        return {"all": found, "count": torch.ones_like(grad).sum()}

    def combine(self, sums: Mapping[str, Tensor], h: Hyper) -> dict[str, Tensor]:
        return {"median": sums["all"].median(-1).values.double(), "count": sums["count"]}

    def update(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> tuple[Tensor, State]:
        return grad / h.median, {}


@dataclass(frozen=True)
class Remembering(Rule):
    """Steps by the sum of the learning rates so far."""

    lr: float = 0.1
    elementwise: ClassVar[bool] = True

    def init(self, param: Tensor) -> State:
        return {}

    def memory(self) -> dict[str, float]:
        return {"lr_sum": 0.0}

    def remember(self, step: int, values: Mapping[str, Any]) -> dict[str, float]:
        return {"lr_sum": values["lr_sum"] + values["lr"]}

    def update(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> tuple[Tensor, State]:
        return h.lr_sum * torch.ones_like(grad), {}

    def apply(self, param: Tensor, direction: Tensor, h: Hyper) -> Tensor:
        moved: Tensor = param - direction
        return moved


@dataclass(frozen=True)
class Observing(Rule):
    """Steps along an extra gradient, renewed at every other step."""

    lr: float = 1.0
    extra: str = "sampled_labels"

    def init(self, param: Tensor) -> State:
        return {"seen": torch.zeros_like(param), "previous_param": torch.zeros_like(param)}

    def wants(self, step: int) -> Extra | None:
        return self.extra if step % 2 == 0 else None  # type: ignore[return-value]

    def observe(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> State:
        return {"seen": grad * h.batch_tokens}

    def update(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> tuple[Tensor, State]:
        return state["seen"], {"previous_param": param}


@dataclass(frozen=True)
class Averaging(Rule):
    """Evaluates the mean of the weights and zero."""

    lr: float = 0.1
    averages: ClassVar[bool] = True

    def init(self, param: Tensor) -> State:
        return {}

    def update(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> tuple[Tensor, State]:
        return grad, {}

    def average(self, param: Tensor, state: State, h: Hyper) -> Tensor:
        return param / 2


@dataclass(frozen=True)
class Counting(Wrapper):
    """Counts steps where parameters are stored, and prepares the state before each."""

    def init(self, param: Tensor) -> State:
        return {
            **self.inner.init(param),
            "count": param.new_zeros(()),
            "ready": param.new_zeros(()),
        }

    def prepares(self, step: int) -> bool:
        return step == 2

    def prepare(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> State:
        return {"ready": grad.sum()}

    def move(
        self, param: Tensor, direction: Tensor, state: State, h: Hyper
    ) -> tuple[Tensor, State]:
        new, changed = self.inner.move(param, direction, state, h)
        return new, {**changed, "count": state["count"] + 1}


def stepped(optimizer: steepest.Optimizer, params: list[nn.Parameter], steps: range) -> None:
    for step, grads in enumerate(problems.stream(steps.stop, SHAPES)):
        if step in steps:
            problems.set_gradients(params, grads)
            optimizer.step()


@pytest.mark.parametrize("compile", [False, True])
def test_sums_over_all_parameters(compile: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)
    params = problems.parameters(torch.float64, SHAPES)
    groups = [{"params": params[:1], "lr": 0.1}, {"params": params[1:], "lr": 0.2}]
    optimizer = steepest.create(Normed(), groups, compile=compile)
    before = [p.detach().clone() for p in params]
    for count, grads in enumerate(problems.stream(2, SHAPES), start=1):
        problems.set_gradients(params, grads)
        optimizer.step()
        norm = torch.cat([g.double().flatten() for g in grads]).norm()
        for i, (p, p0, g) in enumerate(zip(params, before, grads, strict=True)):
            expected = p0 - (0.2 if i else 0.1) * g.double() / norm * count
            torch.testing.assert_close(p.detach(), expected, rtol=1e-12, atol=1e-14)
        before = [p.detach().clone() for p in params]


def test_shared_values_are_saved_and_of_each_run() -> None:
    params = problems.parameters(torch.float64, SHAPES)
    optimizer = steepest.create(Normed(), params)
    stepped(optimizer, params, range(3))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    fresh = [nn.Parameter(p.detach().clone()) for p in params]
    resumed = steepest.create(Normed(), fresh)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    stepped(optimizer, params, range(3, 5))
    stepped(resumed, fresh, range(3, 5))
    assert_same_bits(fresh, params)
    both = nn.Parameter(torch.zeros(2, 3))
    runs = steepest.create(Normed(), [both], runs=2)
    both.grad = torch.tensor([[3.0, 4.0, 0.0], [0.0, 0.0, 2.0]])
    runs.step()
    torch.testing.assert_close(both.detach(), torch.tensor([[-0.06, -0.08, 0], [0, 0, -0.1]]))


@pytest.mark.parametrize("runs", [None, 2])
def test_medians_over_all_parameters(runs: int | None) -> None:
    shapes = SHAPES if runs is None else tuple((2, *s) for s in SHAPES)
    params = problems.parameters(torch.float64, shapes)
    optimizer = steepest.create(ByMedian(), params, runs=runs, compile=False)
    medians = torch.ones(runs or 1, dtype=torch.float64)
    for step, grads in enumerate(problems.stream(3, shapes), start=1):
        before = [p.detach().clone() for p in params]
        problems.set_gradients(params, grads)
        optimizer.step()
        if step == 2:
            rows = [g.double().abs().reshape(runs or 1, -1) for g in grads[:2]]
            medians = torch.cat(rows, 1).median(1).values
        for p, p0, g in zip(params, before, grads, strict=True):
            by = medians.view(-1, *[1] * (g.ndim - 1)) if runs else medians[0]
            torch.testing.assert_close(p.detach(), p0 - 0.1 * g.double() / by)
    assert optimizer.param_groups[0]["shared"]["count"].flatten()[0] == 12 + 12 + 5 + 1


def test_memory_adds_up_past_values_of_each_parameter() -> None:
    params = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3))]
    optimizer = steepest.create(Remembering(), params)
    for lr, present in ((0.1, (0, 1)), (0.2, (1,)), (0.4, (0, 1))):
        optimizer.param_groups[0]["lr"] = lr
        for i, p in enumerate(params):
            p.grad = torch.ones_like(p) if i in present else None
        optimizer.step()
    torch.testing.assert_close(params[0].detach(), torch.full((2,), -(0.1 + 0.5)))
    torch.testing.assert_close(params[1].detach(), torch.full((3,), -(0.1 + 0.3 + 0.7)))
    saved = copy.deepcopy(optimizer.state_dict())
    assert saved["state"][0]["lr_sum"] == pytest.approx(0.5)


def test_extra_gradients_are_asked_for_and_needed() -> None:
    p = nn.Parameter(torch.zeros(2, 2))
    optimizer = steepest.create(Observing(), [p])
    p.grad = torch.ones(2, 2)
    assert optimizer.wants() == set()
    optimizer.step()
    assert optimizer.wants() == {"sampled_labels"}
    with pytest.raises(UserError, match="sampled_labels"):
        optimizer.step()
    p.grad = torch.full((2, 2), 3.0)
    optimizer.observe(batch_tokens=10)
    assert p.grad is None
    assert optimizer.wants() == set()
    p.grad = torch.ones(2, 2)
    optimizer.step()
    assert torch.equal(p.detach(), torch.full((2, 2), -30.0))


def test_a_closure_is_also_called_at_the_previous_weights() -> None:
    p = nn.Parameter(torch.full((2,), 5.0))
    optimizer = steepest.create(Observing(extra="previous_weights", lr=0.1), [p])
    seen = []

    def closure() -> float:
        seen.append(p.detach().clone())
        optimizer.zero_grad()
        (p * p).sum().backward()
        return float((p * p).sum().detach())

    optimizer.step(closure)
    optimizer.step(closure)
    assert [float(s[0]) for s in seen] == [5.0, 5.0, 5.0]
    torch.testing.assert_close(p.detach(), torch.full((2,), 5 - 0.1 * 10.0))
    optimizer.step(closure)
    optimizer.step(closure)  # One step back from 3 (the third step moved by 1 more) is 4.
    assert [float(s[0]) for s in seen[3:]] == pytest.approx([4.0, 4.0, 3.0])


@pytest.mark.parametrize("layout", [{}, {"split": (2, 2, 2)}, {"transposed": True}])
@pytest.mark.parametrize("name", ["mars_adamw", "mars_shampoo"])
def test_the_whole_model_goes_back_to_the_previous_weights(
    name: str, layout: dict[str, Any]
) -> None:
    # Also what AdamW steps, and matrices that are stepped in blocks or turned.
    shapes = ((6, 6), (4, 6), (7,))
    params = problems.parameters(shapes=shapes)
    groups = [{"params": [params[0]], "role": "hidden", **layout}]
    groups += [{"params": [params[1]], "role": "embedding"}]
    groups += [{"params": [params[2]], "role": "vector"}]
    optimizer = steepest.create(name, groups, exact=True)
    grads = list(problems.stream(3, shapes))
    before = [p.detach().clone() for p in params]
    problems.set_gradients(params, grads[0])
    optimizer.step()
    now = [p.detach().clone() for p in params]
    assert not any(torch.equal(a, b) for a, b in zip(before, now, strict=True))
    with optimizer.previous_weights():
        assert_same_bits(params, before)
    assert_same_bits(params, now)


def test_evaluation_weights_come_and_go_to_the_bit() -> None:
    params = problems.parameters(shapes=SHAPES)
    optimizer = steepest.create(Averaging(), params)
    optimizer.eval()  # Before any step there is nothing to average.
    assert_same_bits(params, problems.parameters(shapes=SHAPES))
    stepped(optimizer, params, range(2))
    trained = [p.detach().clone() for p in params]
    optimizer.eval()
    optimizer.eval()
    assert_same_bits(params, [p / 2 for p in trained])
    with pytest.raises(UserError, match=r"evaluation mode.*train\(\)"):
        optimizer.step()
    optimizer.train()
    assert_same_bits(params, trained)
    optimizer.train()
    assert_same_bits(params, trained)


def test_saved_in_evaluation_mode_it_continues_to_the_bit() -> None:
    # As a trainer does that evaluates and then saves.
    params = problems.parameters(shapes=SHAPES)
    optimizer = steepest.create(Averaging(), params)
    stepped(optimizer, params, range(2))
    optimizer.eval()
    file = io.BytesIO()
    torch.save([optimizer.state_dict(), [p.detach() for p in params]], file)
    file.seek(0)
    state, values = torch.load(file, weights_only=True)
    fresh = [nn.Parameter(v) for v in values]
    resumed = steepest.create(Averaging(), fresh)
    resumed.load_state_dict(state)
    with pytest.raises(UserError, match="evaluation mode"):
        resumed.step()
    optimizer.train()
    resumed.train()
    assert_same_bits(fresh, params)
    stepped(optimizer, params, range(2, 4))
    stepped(resumed, fresh, range(2, 4))
    assert_same_bits(fresh, params)
    assert "training_param" not in resumed.state_dict()["state"][0]


def test_evaluation_mode_without_its_training_weights_is_refused() -> None:
    params = problems.parameters(shapes=SHAPES)
    optimizer = steepest.create(Averaging(), params)
    stepped(optimizer, params, range(2))
    optimizer.eval()
    state = optimizer.state_dict()
    for own in state["state"].values():
        own.pop("training_param", None)
    with pytest.raises(UserError, match=r"training weights are not in it.*train\(\)"):
        optimizer.load_state_dict(state)


def test_a_gradient_that_is_state_is_saved() -> None:
    @dataclass(frozen=True)
    class Buffer(Averaging):
        """Leaves half of the gradient in its buffer."""

        averages: ClassVar[bool] = False
        keeps_gradient: ClassVar[bool] = True

        def update(
            self, grad: Tensor, param: Tensor, state: State, h: Hyper
        ) -> tuple[Tensor, State]:
            return grad, {"grad": grad / 2}

    params = problems.parameters(shapes=SHAPES)
    optimizer = steepest.create(Buffer(), params)
    stepped(optimizer, params, range(2))
    optimizer.zero_grad()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    fresh = [nn.Parameter(p.detach().clone()) for p in params]
    resumed = steepest.create(Buffer(), fresh)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for p, q, g in zip(params, fresh, list(problems.stream(2, SHAPES))[1], strict=True):
        assert p.grad is not None
        assert q.grad is not None
        assert torch.equal(p.grad, q.grad)
        assert torch.equal(q.grad, g / 2)
        assert q.grad.data_ptr() != p.grad.data_ptr()


def test_preparing_and_moving() -> None:
    params = problems.parameters(shapes=SHAPES)
    optimizer = steepest.create(Counting(inner=Averaging()), params)
    stepped(optimizer, params, range(3))
    grads = list(problems.stream(3, SHAPES))
    for p, g in zip(params, grads[1], strict=True):
        assert float(optimizer.state[p]["count"]) == 3
        torch.testing.assert_close(optimizer.state[p]["ready"], g.sum())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_gradients_that_are_not_finite(value: float) -> None:
    def build(nonfinite: Any) -> tuple[list[nn.Parameter], steepest.Optimizer]:
        params = problems.parameters(shapes=SHAPES)
        optimizer = steepest.create("adamw", params, nonfinite=nonfinite)
        stepped(optimizer, params, range(2))
        assert params[1].grad is not None
        params[1].grad[0, 0] = value
        return params, optimizer

    params, optimizer = build("skip")
    before = copy.deepcopy([[p.detach() for p in params], optimizer.state_dict()["state"]])
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert_same_bits(params, before[0])
    for mine, theirs in zip(optimizer.state.values(), before[1].values(), strict=True):
        assert all(torch.equal(torch.as_tensor(mine[k]), torch.as_tensor(theirs[k])) for k in mine)
    _, optimizer = build("raise")
    with pytest.raises(FloatingPointError, match="not finite"):
        optimizer.step()
    params, optimizer = build("propagate")
    optimizer.step()
    assert params[1].isnan().any()
    with pytest.raises(UserError, match="nonfinite"):
        steepest.create("adamw", params, nonfinite="ignore")  # type: ignore[arg-type]
