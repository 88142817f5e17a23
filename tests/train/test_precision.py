"""Numerics: which dtypes a run has, and what rounding does to it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import steepest
from steepest import data, models
from steepest.train import RunConfig, Runtime, is_resolved, precision, resolve, run
from steepest.train.learner import Learner
from steepest.train.resolving import open_data

from .conftest import MakeConfig

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
PURE = ("pure_bfloat16", "pure_bfloat16_stochastic", "pure_bfloat16_kahan")


def batch() -> data.Batch:
    torch.manual_seed(0)
    return data.Batch(*torch.randint(300, (2, 4, 16)))


def test_auto_is_what_the_device_does_well(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(steps=6, precision="auto")
    tokens = open_data(config.data)
    pinned = [resolve(config, tokens, device) for device in (CPU, CUDA)]
    assert [c.training.precision for c in pinned] == ["float32", "bfloat16"]
    assert pinned[0].hash() != pinned[1].hash()
    fingerprint = dataclasses.replace(config.data, fingerprint=tokens.fingerprint)
    assert not is_resolved(dataclasses.replace(config, data=fingerprint))
    assert all(map(is_resolved, pinned))
    for given in PURE:
        asked = make_config(precision=given)
        assert resolve(asked, tokens, CUDA).training.precision == given

    result = run(config, tmp_path, runtime=Runtime(threads=1))
    assert result["config"]["training"]["precision"] == "float32"
    same = run(make_config(steps=6, precision="float32"), tmp_path, runtime=Runtime(threads=1))
    assert same == result  # the same run, complete


@pytest.mark.parametrize("name", ["float32", "bfloat16", *PURE])
def test_dtypes_of_weights_gradients_and_state(name: str, make_config: MakeConfig) -> None:
    learner = Learner(make_config(name="adamw", precision=name), CPU)
    learner.gradient(batch())
    dtype = torch.bfloat16 if name in PURE else torch.float32
    assert {p.dtype for p in learner.parameters} == {dtype}
    assert {p.grad.dtype for p in learner.parameters if p.grad is not None} == {dtype}
    learner.optimizer.step()
    state = learner.optimizer.state[learner.parameters[0]]
    assert state["exp_avg"].dtype == torch.float32
    with precision.autocast(learner.config.training.precision, CPU):
        assert learner.model(batch().tokens).dtype == (
            torch.float32 if name == "float32" else torch.bfloat16
        )


def moved_gains(make_config: MakeConfig, name: str) -> tuple[float, float]:
    """Return the share of norm gains that 100 steps of AdamW at 1e-3 move, and how far."""
    config = make_config(name="adamw", lr=1e-3, precision=name, steps=100, clip_norm=0.0)
    config = dataclasses.replace(
        config, schedule=dataclasses.replace(config.schedule, name="constant", warmup_steps=0)
    )
    learner = Learner(config, CPU)
    gains = [p for p in learner.parameters if p.ndim == 1]
    torch.manual_seed(0)
    for _ in range(100):
        for p in learner.parameters:
            p.grad = (torch.randn(p.shape) + 0.5).to(p.dtype)
        learner.optimizer.step()
    found = torch.cat([gain.detach().float() for gain in gains])
    return (found != 1).float().mean().item(), (1 - found).mean().item()


def test_pure_bfloat16_freezes_gains_and_better_rounding_moves_them(
    make_config: MakeConfig,
) -> None:
    # Half the distance from 1 down to the next number of bfloat16 is 2^-9, about 2e-3.
    _, exact = moved_gains(make_config, "float32")
    assert exact > 0.02
    assert moved_gains(make_config, "pure_bfloat16") == (0.0, 0.0)
    for name in ("pure_bfloat16_stochastic", "pure_bfloat16_kahan"):
        share, distance = moved_gains(make_config, name)
        assert share > 0.9
        assert distance == pytest.approx(exact, rel=0.15)


def rounded(seed: int, steps: int) -> list[torch.Tensor]:
    """Return which elements of two equal tensors a step rounds up to 1, for each of some steps.

    Its aim is 0.3 of bfloat16's last place below 1.
    """
    weights = [torch.nn.Parameter(torch.ones(400, 500, dtype=torch.bfloat16)) for _ in range(2)]
    optimizer = steepest.create(
        "sgd", weights, lr=0.3 * 2**-8, momentum=0.0, weight_decay=0.0, seed=seed,
        wrap=precision.WRAPPERS["pure_bfloat16_stochastic"],
    )  # fmt: skip
    found = []
    for _ in range(steps):
        for weight in weights:
            torch.nn.init.ones_(weight)
            weight.grad = torch.ones_like(weight)
        optimizer.step()
        found += [weight.detach() == 1 for weight in weights]
        assert {w.item() for w in weights[0].unique()} == {1.0, 1 - 2**-8}
    return found


def test_stochastic_rounding_is_right_on_average_and_a_function_of_seed_parameter_and_step() -> (
    None
):
    draws = rounded(seed=1, steps=2)
    assert all(map(torch.equal, draws, rounded(seed=1, steps=2)))
    for draw in [*draws, *rounded(seed=2, steps=1)]:
        up = draw.double().mean().item()
        assert up == pytest.approx(0.7, abs=5 * (0.7 * 0.3 / draw.numel()) ** 0.5)
    draws += rounded(seed=2, steps=1)
    for index, one in enumerate(draws):
        for other in draws[:index]:
            assert (one & other).double().mean().item() == pytest.approx(0.49, abs=6e-3)


def test_the_norm_of_bfloat16_tensors_is_not_rounded_to_it() -> None:
    generator = torch.Generator().manual_seed(0)
    for dtype, tolerance in ((torch.bfloat16, 1e-6), (torch.float32, 1e-6), (torch.float64, 1e-14)):
        tensors = [torch.randn(n, n, generator=generator).to(dtype) for n in (30, 7)]
        wanted = torch.cat([t.flatten().double() for t in tensors]).norm().item()
        found = precision.norm(tensors)
        assert found.dtype == torch.promote_types(dtype, torch.float32)
        assert found.item() == pytest.approx(wanted, rel=tolerance)
        if dtype == torch.float32:  # the bits that runs have had
            assert torch.equal(found, torch.nn.utils.get_total_norm(tensors))


def test_gradients_in_bfloat16_are_clipped_by_their_norm(make_config: MakeConfig) -> None:
    learner = Learner(make_config(precision="pure_bfloat16", clip_norm=0.125), CPU)
    whole = learner.gradient(batch(), clip=False).norm.item()
    gradients = torch.cat([p.grad.flatten() for p in learner.parameters if p.grad is not None])
    assert whole == pytest.approx(gradients.double().norm().item(), rel=1e-6)
    assert learner.gradient(batch()).norm.item() == whole > 0.125
    clipped = torch.cat([p.grad.flatten() for p in learner.parameters if p.grad is not None])
    assert clipped.double().norm().item() == pytest.approx(0.125, rel=1e-4)


MODELS: dict[str, Any] = {
    "llama": models.LlamaConfig(300, 16, 2, heads=2, intermediate_size=32),
    "gpt2": models.GPT2Config(300, 16, 2, heads=2),
    "moe": models.MoEConfig(300, 16, 2, heads=2, intermediate_size=32, experts=4),
}


def gradients(config: RunConfig, *, compiled: bool = False) -> list[torch.Tensor]:
    learner = Learner(config, CPU)
    if compiled:
        objective: Any = learner._objective
        objective.forward = torch.compile(objective.forward, backend="aot_eager", dynamic=False)
    learner.gradient(batch(), clip=False)
    return [p.grad for p in learner.parameters if p.grad is not None]


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("numbers", ["float32", "bfloat16"])
def test_recomputed_activations_give_the_same_gradient(
    kind: str, numbers: str, make_config: MakeConfig
) -> None:
    base = dataclasses.replace(
        make_config(gradient_accumulation=2, precision=numbers), model=MODELS[kind]
    )
    recomputed = dataclasses.replace(
        base, training=dataclasses.replace(base.training, recompute_activations=True)
    )
    plain, again = gradients(base), gradients(recomputed)
    assert len(plain) == len(again)
    assert all(torch.equal(left, right) for left, right in zip(plain, again, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
def test_recomputing_compiles(kind: str, make_config: MakeConfig) -> None:
    base = dataclasses.replace(make_config(recompute_activations=True), model=MODELS[kind])
    for left, right in zip(gradients(base), gradients(base, compiled=True), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-6)


def test_tf32_is_the_runs_and_is_given_back(make_config: MakeConfig, tmp_path: Path) -> None:
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before = products.allow_tf32, convolutions.allow_tf32
    seen = []

    def look(progress: object) -> None:
        seen.append((products.allow_tf32, convolutions.allow_tf32))

    for choice in (True, False):
        config = make_config(steps=6, tf32=choice)
        result = run(config, tmp_path, runtime=Runtime(threads=1), on_progress=look)
        environment = json.loads((tmp_path / result["hash"] / "environment.json").read_text())
        assert environment["tf32"] is choice
        assert set(seen) == {(choice, choice)}
        assert (products.allow_tf32, convolutions.allow_tf32) == before
        seen.clear()
