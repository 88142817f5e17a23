"""Presets: values as their sources have them, under names that the optimizers take."""

from __future__ import annotations

import re

import problems
import pytest
from torch import nn

import steepest
from steepest.errors import UserError
from steepest.optim.catalogue import WRAPPERS, recipe
from steepest.optim.presets import Preset, preset, presets, tuned

ALL = [found for optimizer in tuned() for found in presets(optimizer).values()]
IDS = [f"{found.optimizer} {found.name}" for found in ALL]

# Typed by hand from the sources.
ANCHORS = {
    ("adamw", "c4-llama-350m"): {
        "lr": 1e-3,
        "weight_decay": 0.0,
        "betas": (0.9, 0.99),
        "eps": 1e-8,
    },
    ("adabelief", "c4-llama-1b"): {"lr": 1e-3, "eps": 1e-12, "rectify": True},
    ("adan", "c4-llama-350m"): {"lr": 3e-3, "betas": (0.9, 0.92, 0.99)},
    ("came", "c4-llama-1b"): {"lr": 3e-4, "betas": (0.9, 0.999, 0.9999), "eps2": 1e-6},
    ("conda", "c4-llama-350m"): {"lr": 1e-2, "update_interval": 2000, "scale": 0.25},
    ("conda", "c4-llama-1b"): {"lr": 5e-4, "update_interval": 200, "scale": 1.0},
    ("galore_adamw", "c4-llama-1b"): {"lr": 1e-2, "rank": 1024, "update_interval": 200},
    ("muon", "c4-llama-350m"): {
        "lr": 6e-3,
        "momentum": 0.95,
        "adam_lr": 6e-3,
        "adam_betas": (0.9, 0.95),
    },
    ("ortho_adam", "c4-llama-350m"): {"lr": 2e-2, "betas": (0.9, 0.999)},
    ("prodigy", "c4-llama-350m"): {"lr": 2.0, "betas": (0.9, 0.95)},
    ("rmnp", "c4-llama-1b"): {"lr": 1e-2, "momentum": 0.95, "adam_lr": 1e-2},
    ("signum", "c4-llama-1b"): {"lr": 1e-4, "momentum": 0.9},
    ("lion", "fineweb-edu-340m"): {"lr": 3e-4, "weight_decay": 0.1, "betas": (0.9, 0.99)},
    ("apollo", "fineweb-edu-1b"): {"lr": 3e-3, "rank": 512, "scale": 1.41421356237},
    ("adamw", "fineweb-124m"): {"lr": 1e-3, "weight_decay": 0.1, "betas": (0.8, 0.999)},
    ("adamw", "fineweb-124m-wsd"): {"lr": 5e-4},
    ("ademamix", "fineweb-720m"): {"alpha": 8.0, "alpha_warmup": 48_000, "beta3_warmup": 48_000},
    ("d_muon", "fineweb-720m"): {"lr": 1e-3, "adam_betas": (0.9, 0.99), "momentum": 0.95},
    ("lion", "fineweb-720m"): {"lr": 2e-4},
    ("mars_adamw", "fineweb-moe-520m"): {"lr": 3e-3, "betas": (0.95, 0.99), "adam_lr": 1e-3},
    ("muon", "fineweb-210m"): {"lr": 1e-2, "weight_decay": 0.0, "adam_weight_decay": 0.1},
    ("schedulefree_adamw", "fineweb-210m"): {"betas": (0.9, 0.9999), "warmup_steps": 8000},
    ("signum", "fineweb-124m"): {"momentum": 0.9, "nesterov": False},
    ("signum", "fineweb-720m"): {"lr": 2e-4, "momentum": 0.95, "nesterov": True},
    ("sophia_g", "fineweb-124m"): {"rho": 0.009375},
    ("scale", "scale-c4-350m"): {
        "lr": 0.032,
        "embedding_lr": 0.17888543820,
        "head_momentum": 0.9,
        "adam_lr": 2e-2,
    },
    ("kron", "fantastic-520m-4x"): {"lr": 0.0005, "weight_decay": 0.5, "probability": (1.0, 0.1)},
    ("mudam", "fantastic-520m-1x"): {"lr": 0.004, "adam_lr": 0.004, "weight_decay": 0.2},
    ("scion", "fantastic-130m-1x"): {"lr": 0.016, "momentum": 0.05, "head_lr": 0.0032},
    ("adamw", "fantastic-130m-1x"): {"lr": 0.008, "betas": (0.9, 0.98), "eps": 1e-20},
    ("lion", "fantastic-520m-8x"): {"lr": 0.0005, "weight_decay": 0.6},
    ("muon", "fantastic-1.2b-8x"): {"lr": 0.004, "momentum": 0.98, "adam_lr": 0.0012},
    ("soap", "fantastic-300m-16x"): {"lr": 0.004, "shampoo_beta": 0.9, "update_interval": 10},
}


@pytest.mark.parametrize(("optimizer", "name"), ANCHORS)
def test_values_are_those_of_the_sources(optimizer: str, name: str) -> None:
    found = preset(optimizer, name).hyperparameters
    for key, value in ANCHORS[optimizer, name].items():
        assert found[key] == pytest.approx(value, rel=1e-9), key


def test_every_published_setting_is_there() -> None:
    families = [re.sub(r"-\d.*", "", found.name) for found in ALL]
    assert {family: families.count(family) for family in families} == {
        "c4-llama": 48,
        "fineweb-edu": 24,
        "fineweb": 37,
        "fineweb-moe": 12,
        "scale-c4": 5,
        "fantastic": 156,
    }


@pytest.mark.parametrize("found", ALL, ids=IDS)
def test_every_preset_says_where_it_is_from_and_what_for(found: Preset) -> None:
    assert re.search(r"arXiv:\d{4}\.\d{5}|[\w-]+/[\w-]+ at \w+", found.source)
    assert re.search(r"[\d,]+ steps of .* tokens", found.setting)
    for word in ("warm-up", "clip", "float"):
        assert word in found.setting
    for text in (found.source, found.setting, found.note):
        assert "\n" not in text
        assert text == text.strip()
    assert {"lr", "weight_decay"} <= set(found.hyperparameters)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return problems.llama()


@pytest.mark.parametrize("found", ALL, ids=IDS)
def test_every_preset_is_of_hyperparameters_that_its_optimizer_has(
    found: Preset, model: nn.Module
) -> None:
    assert found.optimizer in steepest.names()
    described = steepest.describe(found.optimizer).hyperparameters
    taken = set(described)
    for part in recipe(found.optimizer).parts:
        taken |= {f"{part.prefix}_{name}" for name in part.rule.hyperparameters()}
    assert set(found.hyperparameters) <= taken
    for key, value in found.hyperparameters.items():
        default, _ = described.get(key, (None, ""))
        assert default is None or type(value) is type(default), key
    assert set(found.wrap) <= set(WRAPPERS)
    optimizer = steepest.create(found.optimizer, model, preset=found.name)
    assert found.hyperparameters["lr"] in {group["lr"] for group in optimizer.param_groups}


def test_cautious_is_a_wrapper_around_adamw() -> None:
    wrapped = [found for found in ALL if found.wrap]
    assert {found.optimizer for found in wrapped} == {"adamw"}
    assert all(found.wrap == ("cautious",) for found in wrapped)
    assert len(wrapped) == 12


def test_misnamed_methods_are_under_what_they_are() -> None:
    for optimizer, theirs in (("signum", "sophia"), ("ortho_adam", "shampoo"), ("adam", "lamb")):
        for name in ("c4-llama-350m", "c4-llama-1b"):
            assert f"calls this '{theirs}'" in preset(optimizer, name).note
    assert not {"shampoo", "lamb"} & set(tuned())


def test_an_unknown_preset_is_an_error_with_the_nearest_name() -> None:
    with pytest.raises(UserError, match="did you mean 'c4-llama-350m'"):
        preset("adamw", "c4-lama-350m")
    with pytest.raises(UserError, match="no presets of nothing"):
        preset("nothing", "c4-llama-350m")
    assert presets("nothing") == {}


def test_presets_can_not_be_changed() -> None:
    found = preset("adamw", "c4-llama-350m")
    with pytest.raises(TypeError):
        found.hyperparameters["lr"] = 1.0  # type: ignore[index]
    presets("adamw").clear()
    assert presets("adamw")
