"""The catalogue: every name is complete, described, and does what it says."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from dataclasses import dataclass

import problems
import pytest
import torch
from engine import knob, sample
from made_up_rules import Observing

import steepest
from steepest.errors import UserError
from steepest.optim import catalogue
from steepest.optim.rules.adam import AdamW
from steepest.optim.rules.variance_reduced import MarsAdamW

NAMES = steepest.names()


def test_names_are_those_that_the_tests_cover() -> None:
    assert list(dict.fromkeys(NAMES)) == NAMES
    assert {"sgd", "signum", "lion", "adamw", "adafactor", "muon", "soap"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_descriptions_are_complete(name: str) -> None:
    about = steepest.describe(name)
    assert about.name == name
    assert about.family
    assert 1950 <= about.year <= 2100
    assert re.search(r"arXiv:\d{4}\.\d{4,5}|https://|Polyak", about.paper)
    assert "<-" in about.formula or "u =" in about.formula
    assert not any(line.startswith(" " * 8) for line in about.formula.splitlines())
    assert about.roles
    assert set(about.roles) <= {role.value for role in steepest.Role}
    for key, (default, meaning) in about.hyperparameters.items():
        assert meaning.strip(), key
        assert not meaning.endswith(".")
        assert isinstance(default, (float, int, bool, str, tuple, type(None)))
    assert list(about.hyperparameters)[:2] == ["lr", "weight_decay"]


@pytest.mark.parametrize("name", catalogue.WRAPPERS)
def test_every_hyperparameter_of_a_wrapper_has_a_meaning(name: str) -> None:
    about = catalogue.describe_wrapper(name)
    assert "arXiv:" in about.formula
    wrapped = catalogue.WRAPPERS[name](inner=AdamW())
    assert list(about.hyperparameters) == list(wrapped.own_names().values())
    for key, (default, meaning) in about.hyperparameters.items():
        assert meaning.strip(), key
        assert not meaning.endswith(".")
        assert default == getattr(wrapped, key)


def test_a_wrapper_by_a_wrong_name() -> None:
    with pytest.raises(UserError, match=r"'lookahed'.*'lookahead'"):
        catalogue.describe_wrapper("lookahed")


def test_every_meaning_belongs_to_a_hyperparameter() -> None:
    used = {knob(name, key)[0] for name in NAMES for key in steepest.describe(name).hyperparameters}
    own = {
        k: c.prefix
        for c in catalogue.WRAPPERS.values()
        for k in c(inner=AdamW()).own_names().values()
    }
    around = {f"{prefix}_{key}" for key, prefix in own.items()}
    assert used <= set(catalogue.MEANINGS)
    assert set(catalogue.MEANINGS) <= used | own.keys() | around


@dataclass(frozen=True)
class Late(Observing):
    """Takes its first extra gradient after thousands of steps."""

    def wants(self, step: int) -> bool:
        return step == 10_000


def test_what_is_needed_late_is_told() -> None:
    assert any(hook.startswith("sampled labels") for hook in catalogue.hooks(Late()))
    assert not any("second gradient" in hook for hook in catalogue.hooks(MarsAdamW()))
    assert any("second gradient" in hook for hook in catalogue.hooks(MarsAdamW(exact=True)))


# What a recipe sets by what a parameter is.
ADAPTED = {"adam_mini": {"blocks"}}


@pytest.mark.parametrize("name", NAMES)
def test_every_described_hyperparameter_is_taken_and_lands_in_its_groups(name: str) -> None:
    described = steepest.describe(name).hyperparameters
    model = problems.llama()
    plain = steepest.create(name, model)
    given = steepest.create(name, model, **{k: default for k, (default, _) in described.items()})
    for group, same in zip(plain.param_groups, given.param_groups, strict=True):
        assert {k: v for k, v in group.items() if k != "params"} == {
            k: v for k, v in same.items() if k != "params"
        }
        for key, (default, _) in described.items():
            plain_key, rules = knob(name, key)
            adapted = key in ADAPTED.get(name, ())
            if group["rule"] in rules and plain_key != "weight_decay" and not adapted:
                assert group[plain_key] == default


def test_defaults_are_the_papers() -> None:
    # As published: Lion's Table 12 betas, Adam's, Adafactor's section 9, Muon's and SOAP's code.
    def default(name: str, key: str) -> object:
        return steepest.describe(name).hyperparameters[key][0]

    assert default("lion", "betas") == (0.9, 0.99)
    assert default("adamw", "betas") == (0.9, 0.999)
    assert default("adamw", "eps") == 1e-8
    assert default("adafactor", "decay_rate") == 0.8
    assert default("adafactor", "clip_threshold") == 1.0
    assert default("adafactor", "eps") == 1e-30
    assert default("adafactor", "beta1") is None
    assert (default("muon", "lr"), default("muon", "momentum")) == (0.02, 0.95)
    assert (default("muon", "ns_steps"), default("muon", "nesterov")) == (5, True)
    assert default("muon", "adam_betas") == (0.9, 0.95)
    assert default("soap", "betas") == (0.95, 0.95)
    assert (default("soap", "lr"), default("soap", "update_interval")) == (3e-3, 10)


def test_unknown_name() -> None:
    with pytest.raises(UserError, match=r"'soup'.*'soap'"):
        steepest.describe("soup")


def test_descriptions_are_plain_data() -> None:
    for name in NAMES:
        flat = dataclasses.asdict(steepest.describe(name))
        assert all(not isinstance(v, torch.Tensor) for v in flat["state"].values())


LRS = {
    "sgd": 0.1,
    "lars": 10.0,
    "adagrad_norm": 3.0,
    "radam": 1e-2,
    "adafactor": 1e-2,
    "lamb": 3e-2,
    "sgg_lamb": 3e-2,
    "scaled_adam": 0.1,
    "muon": 0.02,
    "ortho_adam": 1e-2,
    "prodigy": 1.0,
    "schedulefree_sgd": 1.0,
}


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_learns(name: str) -> None:
    # Defaults of the paper but for lr, on one batch.
    model = problems.llama()
    adam = {"adam_lr": 2e-3} if "adam_lr" in steepest.describe(name).hyperparameters else {}
    optimizer = steepest.create(name, model, lr=LRS.get(name, 2e-3), **adam)
    batch = problems.batches()[0]
    losses = []
    for _ in range(30):
        losses.append(problems.backward(model, batch))
        sample(optimizer)
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("name", NAMES)
def test_same_run_same_bits(name: str) -> None:
    results = []
    for noise in (1, 2):
        torch.manual_seed(noise)  # Global random state must not matter.
        model = problems.llama()
        optimizer = steepest.create(name, model)
        for batch in problems.batches():
            problems.backward(model, batch)
            sample(optimizer)
            optimizer.step()
        results.append([p.detach() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.slow
def test_the_library_imports_torch_alone() -> None:
    code = (
        "import sys, steepest; "
        "bad = {'scipy', 'tokenizers', 'rich', 'tyro', 'jinja2', 'plotly'} & set(sys.modules); "
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
