"""What is no more than a guess is a doubt, and `create` warns of it once."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

import steepest
from steepest import Role


class Layer(nn.Module):
    """A layer that ends in what is called an output."""

    def __init__(self, size: int = 8) -> None:
        super().__init__()
        self.value = nn.Linear(size, size)
        self.output = nn.Linear(size, size)


class Small(nn.Module):
    """A table, one layer without a number, and what follows."""

    def __init__(self, **parts: Any) -> None:
        super().__init__()
        self.table = nn.Embedding(19, 8)
        self.attn = Layer()
        for name, part in parts.items():
            setattr(self, name, part)


def found(model: nn.Module, name: str) -> tuple[str, str]:
    named = steepest.roles(model)[name]
    return named.role.value, named.doubt


def said(model: nn.Module, optimizer: str = "muon", **options: Any) -> list[str]:
    """Return what creating an optimizer warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        steepest.create(optimizer, model, **options)
    assert {warning.filename for warning in caught} <= {__file__}
    return [str(warning.message) for warning in caught]


def bare(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape))


def test_a_name_of_heads_is_a_doubt_where_the_structure_says_otherwise() -> None:
    model = Small(words=nn.Linear(8, 19))
    assert found(model, "attn.output.weight") == ("hidden", "its name is one of output layers")
    assert found(model, "words.weight") == ("head", "")
    # Numbered layers are hidden, whatever the names of their parts.
    model = Small(layers=nn.ModuleList([Layer()]), words=nn.Linear(8, 19))
    assert found(model, "layers.0.output.weight") == ("hidden", "")


def test_the_last_layer_is_a_doubt() -> None:
    role, doubt = found(Small(), "attn.output.weight")
    assert role == "head"
    assert doubt == "only its name and its place tell that it is an output layer"
    for part in (nn.Linear(8, 3), nn.Conv1d(8, 3, 1)):
        role, doubt = found(Small(words=nn.Linear(8, 19), regress=part), "regress.weight")
        assert (role, doubt) == ("hidden", "it is the last layer, so it may be an output layer")
    value = Small(words=nn.Linear(8, 19), Value_Head=nn.Linear(8, 1))
    assert found(value, "words.weight") == ("head", "")
    assert found(value, "Value_Head.weight")[0] == "head"
    assert found(value, "Value_Head.weight")[1]
    network = nn.Sequential(nn.Linear(8, 8, bias=False), nn.ReLU(), nn.Linear(8, 8, bias=False))
    assert [bool(named.doubt) for named in steepest.roles(network).values()] == [False, True]


def test_a_head_within_a_layer_is_a_doubt() -> None:
    def layer(**parts: nn.Module) -> nn.Module:
        own = Layer()
        for name, part in parts.items():
            own.add_module(name, part)
        return own

    doubt = "it has as many rows as an embedding, like an output layer"
    headless = Small(layers=nn.ModuleList([layer(up=nn.Linear(8, 19))]), norm=nn.LayerNorm(8))
    assert found(headless, "layers.0.up.weight") == ("hidden", doubt)
    layers = nn.ModuleList([layer(up=nn.Linear(8, 19), head=nn.Linear(8, 19))])
    headed = Small(layers=layers, words=nn.Linear(8, 19))
    # A hidden layer may be of that size.
    assert found(headed, "layers.0.up.weight") == ("hidden", "")
    assert found(headed, "layers.0.head.weight") == ("hidden", doubt)


def test_a_vocabulary_as_wide_as_hidden_states_tells_nothing() -> None:
    model = Small(words=nn.Linear(8, 8))
    model.table = nn.Embedding(8, 8)
    assert found(model, "words.weight")[0] == "hidden"
    assert "last layer" in found(model, "words.weight")[1]
    assert found(model, "attn.value.weight") == ("hidden", "")


GUESSES = {
    "pos_embed": (bare(16, 8), "embedding", "only its name tells"),
    "position_table": (bare(1, 16, 8), "embedding", "only its name tells"),
    "prompt": (bare(4, 8), "hidden", "no layer's weight"),
    "A_log": (bare(8, 4), "hidden", "no layer's weight"),
    "lora_A": (bare(2, 8), "hidden", "no layer's weight"),
    "projections": (bare(3, 8, 5), "hidden", "nothing tells that it is a stack of matrices"),
    "filters": (bare(8, 1, 4), "vector", "nothing but its shape"),
}


@pytest.mark.parametrize("name", GUESSES)
def test_parameters_of_no_layer_are_doubts(name: str) -> None:
    parameter, role, doubt = GUESSES[name]
    model = Small(words=nn.Linear(8, 19), **{name: parameter})
    assert found(model, name)[0] == role
    assert doubt in found(model, name)[1]


def test_a_stack_whose_matrices_may_be_transposed_is_a_doubt() -> None:
    experts: Any = nn.Module()
    experts.num_experts, experts.mapping = 3, bare(3, 8, 5)
    named = steepest.roles(Small(words=nn.Linear(8, 19), experts=experts))["experts.mapping"]
    assert named.bank
    assert "[out, in] or [in, out] is unknown" in named.doubt
    experts.mapping = bare(3, 8, 8)
    assert found(Small(words=nn.Linear(8, 19), experts=experts), "experts.mapping")[1] == ""


def test_modules_known_by_their_kind_alone_are_doubts() -> None:
    for kind, role in (("ScaleNorm", "vector"), ("RelativePositions", "embedding")):
        module: Any = type(kind, (nn.Module,), {})()
        module.weight = bare(4, 8)
        model = Small(own=module, words=nn.Linear(8, 19))
        assert found(model, "own.weight")[0] == role
        assert "name" in found(model, "own.weight")[1]


def test_a_convolution_of_the_input_is_a_doubt() -> None:
    patches = nn.Conv2d(3, 8, 4, stride=4)
    after, first = Small(patches=patches, words=nn.Linear(8, 19)), nn.Sequential(nn.Conv1d(3, 8, 5))
    assert found(after, "patches.weight") == (
        "hidden",
        "it takes patches, so it may embed the input",
    )
    first.append(nn.Conv1d(8, 8, 5)).append(nn.Linear(8, 3))
    assert found(first, "0.weight") == (
        "hidden",
        "it is the first layer, so it may embed the input",
    )
    assert found(first, "1.weight") == ("hidden", "")


# Warnings.


def odd() -> Any:
    return Small(A_log=bare(8, 4), words=nn.Linear(8, 19), project=nn.Linear(8, 5))


def test_a_doubt_is_warned_of_where_it_matters() -> None:
    model = odd()
    first, second, third = said(model)
    assert first == (
        "A_log is stepped as hidden, but it is no layer's weight, so it may be no matrix. "
        "Say what it is with create(..., roles={'A_log': ...})."
    )
    assert second.startswith("attn.output.weight is stepped as hidden, but its name")
    assert "create(..., roles={'project.weight': ...})" in third
    assert not said(model, "adamw")  # There it makes no difference.
    given: dict[str, Any] = {"project.*": "head", "A_log": Role.VECTOR, "attn.*.weight": "hidden"}
    assert not said(model, roles=given)
    rules = {
        name: group["rule"]
        for group in steepest.create("muon", model, roles=given).param_groups
        for name in group["param_names"]
    }
    assert rules["project.weight"] == rules["A_log"] == rules["words.weight"] == "adamw"
    assert rules["attn.output.weight"] == "muon"


def test_a_doubt_about_every_layer_is_warned_of_once_with_their_pattern() -> None:
    class Mixer(Layer):
        def __init__(self) -> None:
            super().__init__()
            self.gates = nn.ParameterList([bare(8, 4), bare(8, 4)])
            self.lags = bare(8, 4)

    layers = nn.ModuleList([Mixer() for _ in range(3)])
    model = nn.ModuleDict({"layers": layers, "norm": nn.LayerNorm(8)})
    patterns = ("layers.*.lags", "layers.*.gates.*")
    warned = said(model)
    assert len(warned) == len(patterns)
    for pattern, sentence in zip(patterns, warned, strict=True):
        assert sentence.startswith(f"{pattern} is stepped as hidden")
        assert f"create(..., roles={{{pattern!r}: ...}})" in sentence
    assert not said(model, roles=dict.fromkeys(patterns, "vector"))


def test_a_flattened_matrix_is_warned_of() -> None:
    model = nn.Linear(8, 4)
    model.weight = bare(16)
    (warned,) = said(model)
    assert warned.startswith("weight is stepped as vector, but it is flattened")
