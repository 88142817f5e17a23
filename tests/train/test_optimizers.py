"""Optimizers by name, from a file, from a module."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

import steepest
from steepest.errors import UserError
from steepest.models import Llama, LlamaConfig
from steepest.train import OptimizerConfig, Runtime, build, resolve, run
from steepest.train.checkpoints import load_optimizer
from steepest.train.evaluation import evaluation_weights
from steepest.train.optimizers import source_sha256, state_bytes
from steepest.train.resolving import open_data

from .conftest import MakeConfig

SCHEDULE_FREE = '''
import torch


class Averaged(torch.optim.Optimizer):
    """SGD that is evaluated at the running mean of its weights."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, dict(lr=lr))
        self.training = False

    def swap(self):
        for group in self.param_groups:
            for p in group["params"]:
                if self.state[p]:
                    state = self.state[p]
                    state["other"], value = p.detach().clone(), state["other"]
                    p.data.copy_(value)

    def eval(self):
        if self.training:
            self.swap()
        self.training = False

    def train(self):
        if not self.training:
            self.swap()
        self.training = True

    @torch.no_grad()
    def step(self, closure=None):
        assert self.training
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["other"] = p.clone()
                p.sub_(group["lr"] * p.grad)
                state["other"].lerp_(p, 0.1)
'''


@pytest.fixture
def model() -> Llama:
    return Llama(LlamaConfig(vocab_size=32, hidden_size=16, layers=1, intermediate_size=32))


def config(name: str, lr: float = 0.1, **options: Any) -> OptimizerConfig:
    return OptimizerConfig(name=name, lr=lr, options=options)


def test_a_class_in_a_file_decays_matrices_alone(model: Llama, momentum_file: Path) -> None:
    name = f"{momentum_file}:Momentum"
    optimizer = build(config(name, momentum=0.5, weight_decay=0.1), model)
    matrices, vectors = optimizer.param_groups
    assert all(p.ndim >= 2 for p in matrices["params"])
    assert all(p.ndim < 2 for p in vectors["params"])
    assert len(matrices["params"]) + len(vectors["params"]) == len(list(model.parameters()))
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.1, 0.0)
    assert (matrices["lr"], matrices["momentum"]) == (0.1, 0.5)
    assert pickle.loads(pickle.dumps(type(optimizer))) is type(optimizer)


def test_a_class_without_decay_gets_all_parameters(model: Llama) -> None:
    (group,) = build(config("torch.optim:Rprop"), model).param_groups
    assert len(group["params"]) == len(list(model.parameters()))


def test_lists_become_tuples(model: Llama) -> None:
    optimizer = build(config("torch.optim:AdamW", betas=[0.8, 0.9]), model)
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.9)


def test_a_file_is_known_by_its_content(momentum_file: Path, tmp_path: Path) -> None:
    copied = tmp_path / "copy.py"
    copied.write_bytes(momentum_file.read_bytes())
    name = f"{copied}:Momentum"
    assert source_sha256(name) == source_sha256(f"{momentum_file}:Momentum")
    copied.write_text(copied.read_text() + "\n# edited\n")
    assert source_sha256(name) != source_sha256(f"{momentum_file}:Momentum")
    assert source_sha256("adamw") == ""


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("absent.py:Mine", {}, "Cannot read the optimizer file absent.py: No such file"),
        ("{file}:Momentun", {}, "Unknown class 'Momentun'; did you mean 'Momentum'?"),
        ("{file}:torch", {}, "is not a class derived from torch.optim.Optimizer or steepest.Rule."),
        ("{file}:Momentum", {"momentun": 1.0}, "did you mean 'momentum'?"),
        ("{file}:Momentum", {"momentun": 1.0}, "takes lr, momentum, noise, weight_decay"),
        ("no.such.module:Mine", {}, "Cannot import 'no.such.module'"),
        ("..:Mine", {}, "Cannot import '..'"),
        (":Mine", {}, "':Mine' names no class; a class of your own is given as 'path/to/file.py:"),
        ("torch.optim:", {}, "'torch.optim:' names no class"),
        ("torch.optim:AdamW", {"eps": -1.0}, "'torch.optim:AdamW' cannot be built: Invalid eps"),
        (
            "torch.nn:Linear",
            {},
            "is not a class derived from torch.optim.Optimizer or steepest.Rule.",
        ),
    ],
)
def test_wrong_input_gets_a_sentence(
    name: str, options: dict[str, Any], sentence: str, model: Llama, momentum_file: Path
) -> None:
    with pytest.raises(UserError) as caught:
        build(config(name.format(file=momentum_file), **options), model)
    assert sentence in str(caught.value)


def test_a_file_that_fails_says_why(tmp_path: Path, model: Llama) -> None:
    path = tmp_path / "broken.py"
    path.write_text("import absent_package")
    with pytest.raises(UserError, match="failed with ModuleNotFoundError: No module named"):
        build(config(f"{path}:Mine"), model)


def step_once(optimizer: torch.optim.Optimizer, model: Llama) -> None:
    tokens = torch.arange(32).reshape(2, 16)
    model.loss(tokens, tokens).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    optimizer.zero_grad()


def test_state_bytes_counts_tensors_but_not_step_counters(model: Llama) -> None:
    parameters = sum(p.numel() for p in model.parameters())
    optimizer = build(config("torch.optim:AdamW"), model)
    assert state_bytes(optimizer) == 0
    step_once(optimizer, model)
    assert state_bytes(optimizer) == 2 * 4 * parameters


def test_state_is_loaded_in_its_own_dtype(model: Llama, momentum_file: Path) -> None:
    first = build(config(f"{momentum_file}:Momentum"), model)
    step_once(first, model)
    second = build(config(f"{momentum_file}:Momentum"), model)
    load_optimizer(second, copy.deepcopy(first.state_dict()))
    for p in model.parameters():
        assert second.state[p]["buffer"].dtype == torch.float64
        assert torch.equal(second.state[p]["buffer"], first.state[p]["buffer"])


def test_evaluation_weights_are_given_back_to_the_bit(model: Llama, tmp_path: Path) -> None:
    path = tmp_path / "averaged.py"
    path.write_text(SCHEDULE_FREE)
    optimizer = build(config(f"{path}:Averaged"), model)
    optimizer.train()  # type: ignore[attr-defined]
    step_once(optimizer, model)
    before = [p.clone() for p in model.parameters()]
    with evaluation_weights(model, optimizer):
        assert not all(map(torch.equal, before, model.parameters()))
    assert all(map(torch.equal, before, model.parameters()))


def test_an_optimizer_with_modes_trains_and_keeps_both_weights(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    path = tmp_path / "averaged.py"
    path.write_text(SCHEDULE_FREE)
    result = run(make_config(name=f"{path}:Averaged", lr=1.0), tmp_path, runtime=Runtime())
    assert result["val_loss"] < result["initial_val_loss"]
    (file,) = (tmp_path / result["hash"] / "checkpoints").iterdir()
    state = torch.load(file, weights_only=True)
    trained, evaluated = state["learner"]["model"], state["evaluation_model"]
    assert trained.keys() == evaluated.keys()
    assert not all(torch.equal(trained[key], evaluated[key]) for key in trained)


def test_an_optimizer_with_a_closure_trains(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(
        name="torch.optim:LBFGS", lr=0.5, options={"max_iter": 3}, steps=10, clip_norm=0.0
    )
    result = run(config, tmp_path)
    assert result["val_loss"] < result["initial_val_loss"]


def test_a_rule_of_ones_own(tmp_path: Path) -> None:
    """A steepest.Rule in a file is stepped like one of the catalogue."""
    path = tmp_path / "mine.py"
    path.write_text(
        "from dataclasses import dataclass\n"
        "import steepest\n\n"
        "@dataclass(frozen=True)\n"
        "class Plain(steepest.Rule):\n"
        "    lr: float = 0.1\n"
        "    scale: float = 1.0\n"
        "    elementwise = True\n\n"
        "    def init(self, param):\n"
        "        return {}\n\n"
        "    def update(self, grad, param, state, h):\n"
        "        return h.scale * grad, {}\n"
    )
    model = torch.nn.Linear(3, 2)
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    build(OptimizerConfig(f"{path}:Plain", 0.5, {"scale": 2.0}), model).step()
    for p, was in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(p.detach(), was - 1.0)
    with pytest.raises(UserError, match="'scale'"):
        build(OptimizerConfig(f"{path}:Plain", 0.5, {"scal": 2.0}), model)


WITHOUT_LR = """
import torch


class Own(torch.optim.SGD):
    def __init__(self, params, lr=0.1):
        super().__init__(params, lr=lr)
        for group in self.param_groups:
            self.rate = group.pop("lr")
"""


def test_a_class_that_hides_its_learning_rate_is_refused(tmp_path: Path, model: Llama) -> None:
    path = tmp_path / "own.py"
    path.write_text(WITHOUT_LR)
    with pytest.raises(UserError, match="Own has parameter groups without 'lr', where a schedule"):
        build(config(f"{path}:Own"), model)


LENGTHS = """
from dataclasses import dataclass
from typing import ClassVar

import torch
import steepest


class Long(torch.optim.SGD):
    def __init__(self, params, lr=0.1, total_steps=None):
        super().__init__(params, lr=lr)
        assert total_steps


@dataclass(frozen=True)
class Longer(steepest.Rule):
    lr: float = 0.1
    horizon: int | None = None
    total_steps: ClassVar[frozenset[str]] = frozenset({"horizon"})
"""


def test_the_number_of_steps_is_filled_in_where_it_is_declared(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    tokens = open_data(make_config().data)
    file = tmp_path / "lengths.py"
    file.write_text(LENGTHS)

    def options(name: str, **given: Any) -> dict[str, Any]:
        return resolve(make_config(name=name, options=given, steps=42), tokens).optimizer.options

    found = options("ademamix", beta3_warmup=7)
    assert (found["alpha_warmup"], found["beta3_warmup"]) == (42, 7)
    assert options(f"{file}:Long") == {"total_steps": 42}
    assert options(f"{file}:Long", total_steps=3) == {"total_steps": 3}
    assert options(f"{file}:Longer") == {"horizon": 42}
    assert 42 not in options("adamw").values()
    assert options("torch.optim:AdamW") == {}
    assert "total steps: alpha_warmup, beta3_warmup" in steepest.describe("ademamix").hooks


def test_ademamix_warms_up_over_the_whole_run(make_config: MakeConfig, tmp_path: Path) -> None:
    runtime = Runtime(threads=1, checkpoint_every=0)
    implied = run(make_config(name="ademamix", steps=8), tmp_path, runtime=runtime)
    lengths = {"alpha_warmup": 8, "beta3_warmup": 8}
    given = run(make_config(name="ademamix", steps=8, options=lengths), tmp_path, runtime=runtime)
    assert implied == given
    other = run(
        make_config(name="ademamix", steps=8, options={**lengths, "alpha_warmup": 2}),
        tmp_path,
        runtime=runtime,
    )
    assert other["val_loss"] != given["val_loss"]
