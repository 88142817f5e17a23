"""Generation against Hugging Face's, against the softmax, and at its edges."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from steepest.errors import UserError
from steepest.models import (
    DeltaNetConfig,
    GatedDeltaNetConfig,
    GLAConfig,
    GPT2Config,
    LlamaConfig,
    ModelConfig,
    MoEConfig,
    build,
)
from steepest.models.generation import choose, generate
from steepest.models.hugging_face import convert

SMALL = LlamaConfig(
    vocab_size=61, hidden_size=32, layers=2, heads=4, intermediate_size=40, max_sequence_length=24
)
PROMPT = torch.randint(61, (3, 5), generator=torch.Generator().manual_seed(0))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sharp(config: ModelConfig):  # type: ignore[no-untyped-def]
    """Return a model whose predictions are far from even."""
    model = build(config)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(6 if p.ndim > 1 else 1)
    return model


def test_greedy_is_hugging_faces() -> None:
    transformers = pytest.importorskip("transformers")
    model = sharp(SMALL)
    config, weights = convert(SMALL, model.state_dict())
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
    theirs.load_state_dict(weights)
    expected = theirs.generate(
        PROMPT,
        attention_mask=torch.ones_like(PROMPT),
        do_sample=False,
        max_new_tokens=19,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert torch.equal(generate(model, PROMPT, 19), expected)
    assert len(set(expected.flatten().tolist())) > 15


def test_frequencies_are_the_softmax() -> None:
    logits = torch.tensor([1.2, -0.3, 0.4, 2.0, -1.0, 0.0, 0.7])
    draws = 20_000
    found = choose(logits.expand(draws, -1), 0.7, generator=seeded()).bincount(minlength=7)
    expected = draws * (logits / 0.7).softmax(-1)
    chi_square = ((found - expected).square() / expected).sum().item()
    assert chi_square < 22.46  # 0.999 quantile at 6 degrees of freedom


@pytest.mark.parametrize(
    ("cut", "support"),
    [
        ({"top_k": 3}, {3, 0, 6}),
        ({"top_k": 100}, {0, 1, 2, 3, 4}),
        ({"top_p": 0.5}, {3}),  # their probabilities: 0.5, 0.25, 0.125, 0.0625, 0.0625
        ({"top_p": 0.51}, {3, 0}),
        ({"top_p": 0.875}, {3, 0, 6}),
        ({"top_p": 1e-9}, {3}),
        ({"top_p": 1.0}, {0, 1, 2, 3, 4}),
        ({"top_k": 2, "top_p": 0.7}, {3, 0}),  # of the two, 3 has 2/3
        ({"top_k": 2, "top_p": 0.6}, {3}),
    ],
    ids=str,
)
def test_cuts_restrict_the_support(cut: dict[str, float], support: set[int]) -> None:
    odds = {3: 0.5, 0: 0.25, 6: 0.125, 1: 0.0625, 4: 0.0625}
    logits = torch.full((1, 7), -math.inf)
    for index, probability in odds.items():
        logits[0, index] = math.log(probability)
    if len(support) == 5:
        support = set(odds)
    drawn = choose(logits.expand(2000, -1).double(), 1.0, generator=seeded(), **cut)
    assert set(drawn.tolist()) == support
    kept = {index: odds[index] / sum(odds[i] for i in support) for index in support}
    for index, probability in kept.items():
        share = (drawn == index).float().mean().item()
        assert share == pytest.approx(probability, abs=0.05)


def test_temperatures_near_zero_are_greedy() -> None:
    logits = torch.randn(50, 30, generator=seeded())
    for temperature in (1e-3, 1e-300):
        assert torch.equal(choose(logits, temperature, generator=seeded()), logits.argmax(-1))


CONFIGS = [
    SMALL,
    GPT2Config(vocab_size=61, hidden_size=32, layers=1, heads=4, max_sequence_length=24),
    MoEConfig(
        vocab_size=61,
        hidden_size=32,
        layers=1,
        heads=4,
        intermediate_size=40,
        experts=4,
        max_sequence_length=24,
    ),
    GLAConfig(vocab_size=61, hidden_size=32, layers=1, heads=2, max_sequence_length=24),
    DeltaNetConfig(vocab_size=61, hidden_size=32, layers=1, heads=2, max_sequence_length=24),
    GatedDeltaNetConfig(
        vocab_size=61, hidden_size=32, layers=1, heads=2, head_size=12, max_sequence_length=24
    ),
    dataclasses.replace(SMALL, mup_base_width=8),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.architecture)
def test_each_token_is_drawn_from_the_models_prediction(config: ModelConfig) -> None:
    model = sharp(config).train()
    found = generate(model, PROMPT, 6, temperature=0.9, generator=seeded(1))
    assert model.training
    draws, expected = seeded(1), PROMPT
    with torch.no_grad():
        for _ in range(6):
            drawn = choose(model(expected)[:, -1], 0.9, generator=draws)
            expected = torch.cat((expected, drawn[:, None]), 1)
    assert torch.equal(found, expected)
    assert not torch.equal(found, generate(model, PROMPT, 6, temperature=0.9, generator=seeded(2)))


def test_the_window_is_cut_from_the_left() -> None:
    model = sharp(SMALL)
    long = torch.randint(61, (2, 40), generator=seeded(3))
    found = generate(model, long, 5)
    assert torch.equal(found[:, :40], long)
    for place in range(40, 45):
        expected = model(found[:, place - 24 : place])[:, -1].argmax(-1)
        assert torch.equal(found[:, place], expected)
    narrow = generate(model, long, 1, window=7)
    assert torch.equal(narrow[:, -1], model(long[:, -7:])[:, -1].argmax(-1))
    assert torch.equal(generate(model, long, 5, window=99), found)


def test_a_row_ends_with_the_end() -> None:
    model = sharp(SMALL)
    free = generate(model, PROMPT, 12)
    end = int(free[0, 8])
    assert end not in free[0, 5:8]
    calls = count_calls(model)
    found = generate(model, PROMPT, 12, end=end)
    for row, without in zip(found, free, strict=True):
        ends = (without[5:] == end).nonzero()
        stop = 5 + int(ends[0]) if len(ends) else 17
        assert torch.equal(row[:stop], without[:stop])
        assert (row[stop:] == end).all()
    assert calls() == 12
    assert torch.equal(generate(model, PROMPT[:1], 12, end=end), found[:1])
    assert calls() == 12 + 4


def count_calls(model: torch.nn.Module) -> Callable[[], int]:
    """Return a function that tells how often the model's head was used."""
    calls: list[Tensor] = []
    model.lm_head.register_forward_hook(lambda _module, _inputs, output: calls.append(output))
    return lambda: len(calls)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": -1.0}, "temperature must be 0 or a positive number, not -1.0"),
        ({"temperature": math.nan}, "temperature"),
        ({"top_k": 0}, "top_k must be at least 1, not 0"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, not 0.0"),
        ({"top_p": 1.5}, "top_p"),
        ({"window": 0}, "window must be at least 1"),
        ({"new_tokens": -1}, "must not be negative, but it is -1"),
        ({"tokens": torch.empty(1, 0, dtype=torch.int64)}, "at least one token"),
    ],
    ids=str,
)
def test_wrong_numbers_are_a_sentence(arguments: dict[str, object], message: str) -> None:
    model = build(SMALL)
    with pytest.raises(UserError, match=message):
        generate(model, **{"tokens": PROMPT, "new_tokens": 2, **arguments})  # type: ignore[arg-type]
    assert model.training
