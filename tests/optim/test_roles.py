"""Which role each parameter gets, and what follows from it."""

from __future__ import annotations

import problems
import pytest
import torch
from torch import Tensor, nn

import steepest
from steepest import Role
from steepest.errors import UserError
from steepest.optim import NamedRole


class Attention(nn.Module):
    """Names as in Hugging Face's models."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(8, 8)
        self.output = nn.Linear(8, 8)


class HuggingFaceLike(nn.Module):
    """A causal model whose head has an unusual name and which says where it is."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(11, 8),
                "layers": nn.ModuleList([Attention(), Attention()]),
                "norm": nn.LayerNorm(8),
                "conv": nn.Conv2d(2, 4, 3),
            }
        )
        self.vocabulary = nn.Linear(8, 11, bias=False)
        self.temperature = nn.Parameter(torch.ones(()))
        if tied:
            self.vocabulary.weight = self.model["embed_tokens"].weight

    def get_output_embeddings(self) -> nn.Module:
        return self.vocabulary


def decays(optimizer: steepest.Optimizer) -> dict[int, tuple[str, float]]:
    """Return (rule, decay) of every parameter by identity."""
    return {
        id(p): (group["rule"], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }


@pytest.mark.parametrize("tied", [False, True])
def test_llama(tied: bool) -> None:
    model = problems.llama(tie_embeddings=tied)
    found = steepest.roles(model)
    expected = {name: role for name, (_, role) in problems.named_roles(model).items()}
    assert {name: named.role.value for name, named in found.items()} == expected
    assert ("lm_head.weight" in found) is not tied
    assert all(named.reason for named in found.values())
    if tied:
        assert "shared" in found["embed_tokens.weight"].reason
        assert "lm_head" in found["embed_tokens.weight"].reason


@pytest.mark.parametrize("tied", [False, True])
def test_model_that_names_its_output_embeddings(tied: bool) -> None:
    found = {k: v.role for k, v in steepest.roles(HuggingFaceLike(tied)).items()}
    assert found["model.embed_tokens.weight"] is Role.EMBEDDING
    assert found.get("vocabulary.weight") == (None if tied else Role.HEAD)
    assert found["model.layers.0.q_proj.weight"] is Role.HIDDEN
    assert found["model.layers.0.q_proj.bias"] is Role.VECTOR
    assert found["model.norm.weight"] is Role.VECTOR
    assert found["model.conv.weight"] is Role.HIDDEN
    assert found["temperature"] is Role.VECTOR


def test_a_projection_named_output_inside_a_layer_is_hidden() -> None:
    found = steepest.roles(HuggingFaceLike())
    assert found["model.layers.0.output.weight"].role is Role.HIDDEN


def test_a_head_met_before_the_embedding_it_is_tied_to() -> None:
    model = nn.ModuleDict({"head": nn.Linear(4, 9, bias=False), "table": nn.Embedding(9, 4)})
    model["table"].weight = model["head"].weight
    assert {k: v.role for k, v in steepest.roles(model).items()} == {"head.weight": Role.EMBEDDING}


def test_frozen_parameters_have_no_role_and_no_step() -> None:
    model = problems.llama()
    model.embed_tokens.weight.requires_grad_(False)
    assert "embed_tokens.weight" not in steepest.roles(model)
    assert id(model.embed_tokens.weight) not in decays(steepest.create("muon", model))


def test_hidden_matrices_and_heads_decay_unless_asked() -> None:
    model = problems.llama()
    named = problems.named_roles(model)
    asked: tuple[tuple[dict[str, list[Role | str]], set[str]], ...] = (
        ({}, {"hidden", "head"}),
        ({"decay_roles": []}, set()),
        ({"decay_roles": ["embedding", Role.VECTOR]}, {"embedding", "vector"}),
    )
    for options, decayed in asked:
        found = decays(steepest.create("lion", model, weight_decay=0.3, **options))  # type: ignore[arg-type]
        for p, role in named.values():
            assert found[id(p)] == ("lion", 0.3 if role in decayed else 0.0)


def test_muon_steps_hidden_matrices_and_adamw_the_rest() -> None:
    model = problems.llama()
    optimizer = steepest.create("muon", model, weight_decay=0.3, adam_weight_decay=0.2, adam_lr=0.5)
    found = decays(optimizer)
    wanted = {
        "hidden": ("muon", 0.3),
        "head": ("adamw", 0.2),
        "embedding": ("adamw", 0.0),
        "vector": ("adamw", 0.0),
    }
    for p, role in problems.named_roles(model).values():
        assert found[id(p)] == wanted[role]
    assert {g["lr"] for g in optimizer.param_groups if g["rule"] == "adamw"} == {0.5}


def test_muon_needs_roles() -> None:
    model = problems.llama()
    members: tuple[object, ...] = (
        list(model.parameters()),
        list(model.named_parameters()),
        [{"params": list(model.parameters())}],
    )
    for given in members:
        with pytest.raises(UserError, match=r"muon treats.*pass the nn\.Module.*'role'"):
            steepest.create("muon", given)  # type: ignore[arg-type]


def test_members_of_every_kind() -> None:
    table, matrix, gain = (nn.Parameter(torch.ones(s)) for s in ((5, 4), (4, 4), (4,)))
    given: tuple[list[object], ...] = (
        [table, matrix, gain],
        [("table", table), ("matrix", matrix), ("gain", gain)],
        [{"params": [table, matrix], "lr": 0.5}, {"params": gain}],
        [{"params": iter([("table", table)])}, {"params": [("matrix", matrix), ("gain", gain)]}],
    )
    for members in given:
        optimizer = steepest.create("adamw", members, lr=0.1)
        held: list[Tensor] = [p for group in optimizer.param_groups for p in group["params"]]
        assert {id(p) for p in held} == {id(table), id(matrix), id(gain)}
    assert [g["lr"] for g in steepest.create("adamw", given[2], lr=0.1).param_groups] == [0.5, 0.1]
    named = steepest.create("adamw", given[1])
    assert sorted(n for g in named.param_groups for n in g["param_names"]) == [
        "gain",
        "matrix",
        "table",
    ]


def test_without_roles_matrices_decay_and_vectors_do_not() -> None:
    matrix, gain = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4))
    found = decays(steepest.create("adamw", [matrix, gain], weight_decay=0.3))
    assert (found[id(matrix)][1], found[id(gain)][1]) == (0.3, 0.0)


def test_a_group_with_a_role_follows_it_and_its_own_values_win() -> None:
    table, head = nn.Parameter(torch.ones(5, 4)), nn.Parameter(torch.ones(5, 4))
    optimizer = steepest.create(
        "muon",
        [{"params": [table], "role": "embedding", "lr": 0.7}, {"params": [head], "role": "head"}],
        adam_lr=0.1,
        adam_weight_decay=0.2,
    )
    first, second = optimizer.param_groups
    assert (first["rule"], first["lr"], first["weight_decay"]) == ("adamw", 0.7, 0.0)
    assert (second["rule"], second["lr"], second["weight_decay"]) == ("adamw", 0.1, 0.2)


def test_a_role_of_each_single_parameter_is_not_lost_among_its_like() -> None:
    # Decayed and undecayed parameters must not end up in one group.
    model = problems.llama()
    optimizer = steepest.create("adamw", model, weight_decay=0.1)
    for group in optimizer.param_groups:
        kinds = {
            problems.named_roles(model)[n][1] in ("hidden", "head") for n in group["param_names"]
        }
        assert kinds == {group["weight_decay"] > 0}


@pytest.mark.parametrize("pattern", ["model.layers.0.output.weigth", "*.outputs.weight"])
def test_a_pattern_that_matches_nothing_is_named_with_the_nearest(pattern: str) -> None:
    model = HuggingFaceLike()
    nearest = r"did you mean 'model\.layers\.\d\.output\.weight'"
    with pytest.raises(UserError, match=nearest):
        steepest.create("muon", model, roles={pattern: "vector"})
    with pytest.raises(UserError, match=r"role 'vektor'; did you mean 'vector'"):
        steepest.create("muon", model, roles={"*.output.weight": "vektor"})


def test_given_roles_win_over_what_the_model_says() -> None:
    given: dict[str, Role | str | NamedRole] = {
        "*.output.weight": "head",
        "vocabulary.weight": NamedRole(Role.HIDDEN, heads=2),
    }
    found = steepest.roles(HuggingFaceLike(), given)
    for layer in (0, 1):
        named = found[f"model.layers.{layer}.output.weight"]
        assert (named.role, named.reason) == (Role.HEAD, "given")
    assert found["vocabulary.weight"] == given["vocabulary.weight"]
