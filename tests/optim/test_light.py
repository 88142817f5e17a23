"""8-bit states, blocks of Adam-mini, and methods that find their step size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engine import ELEMENTWISE, assert_same_bits, make, moved_alike, sample
from problems import cosine, llama, parameters, set_gradients, stream
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

import steepest
from steepest.errors import UserError
from steepest.optim import quantisation
from steepest.optim.roles import NamedRole, Role

LARGE: tuple[tuple[int, ...], ...] = ((64, 80), (70, 61), (9, 3), (5000,))
NOTHING_TO_QUANTISE = {"signsgd", "adagrad", "adagrad_norm", "schedulefree_sgd"}


def nearest(scaled: Tensor, *, signed: bool) -> Tensor:
    values = quantisation._tables(scaled.device, signed).values.double()
    return values[(scaled.double().unsqueeze(-1) - values).abs().argmin(-1)]


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_codes_are_the_nearest_and_read_back_the_same(dtype: torch.dtype, signed: bool) -> None:
    rng = torch.Generator().manual_seed(0)
    values = torch.randn(70, 61, generator=rng, dtype=dtype) * 10 ** torch.randn(
        70, 61, generator=rng, dtype=dtype
    )
    values = values if signed else values**2
    codes, absmax = quantisation.quantise(values, 100, signed=signed)
    assert codes.shape == values.shape
    assert len(absmax) == 43  # The last block has 70 elements.
    read = quantisation.dequantise(codes, absmax, 100, signed=signed, dtype=dtype)
    for i, block in enumerate(values.flatten().split(100)):
        largest = block.abs().max().float()
        assert absmax[i] == largest
        expected = nearest(block / largest, signed=signed) * largest
        torch.testing.assert_close(
            read.flatten()[100 * i : 100 * (i + 1)].double(), expected, rtol=1e-6, atol=0
        )


@pytest.mark.parametrize("signed", [True, False])
def test_half_way_between_two_codes_is_the_lower_one(signed: bool) -> None:
    values, borders, _ = quantisation._tables(torch.device("cpu"), signed)
    middle = torch.cat([borders[:-1], torch.ones(1, dtype=torch.float64)])
    codes, absmax = quantisation.quantise(middle, 256, signed=signed)
    assert absmax.tolist() == [1.0]
    assert torch.equal(codes[:-1].int(), torch.arange(255, dtype=torch.int32))
    read = quantisation.dequantise(codes, absmax, 256, signed=signed, dtype=torch.float64)
    assert torch.equal(read[:-1], values[:-1].double())


def test_blocks_of_zeros_and_of_nan() -> None:
    values = torch.ones(3, 8)
    values[0] = 0
    values[1, 3] = torch.nan
    codes, absmax = quantisation.quantise(values, 8, signed=True)
    read = quantisation.dequantise(codes, absmax, 8, signed=True)
    assert torch.equal(read[0], torch.zeros(8))
    assert read[1].isnan().all()
    assert torch.equal(read[2], torch.ones(8))


@pytest.mark.parametrize(("plain", "name"), [("adamw", "adam8bit"), ("lion", "lion8bit")])
def test_as_a_wrapper_it_is_the_named_optimizer(plain: str, name: str) -> None:
    ours, theirs = parameters(shapes=LARGE), parameters(shapes=LARGE)
    first, second = make(plain, ours, wrap="quantised"), make(name, theirs)
    for grads in stream(6, LARGE):
        for params, optimizer in ((ours, first), (theirs, second)):
            set_gradients(params, grads)
            optimizer.step()
    assert_same_bits(ours, theirs)
    state = second.state[theirs[0]]
    assert state[f"{'exp_avg' if plain == 'adamw' else 'momentum'}"].dtype is torch.uint8


@pytest.mark.parametrize("name", [n for n in ELEMENTWISE if n not in NOTHING_TO_QUANTISE])
def test_eight_bits_are_near_to_all(name: str) -> None:
    full, coarse, start = (parameters(shapes=LARGE) for _ in range(3))
    optimizers = make(name, full), make(name, coarse, wrap="quantised")
    for grads in stream(8, LARGE):
        for params, optimizer in zip((full, coarse), optimizers, strict=True):
            set_gradients(params, grads)
            optimizer.step()
    assert optimizers[1].state_bytes() < 0.8 * optimizers[0].state_bytes()
    for a, b, p0 in zip(coarse, full, start, strict=True):
        assert a.isfinite().all()
        moved_alike(a, b, p0, 0.35 if name in ("lion", "signum", "adan") else 0.15)


def test_small_tensors_keep_full_states_however_many() -> None:
    shapes = ((40, 40), (60, 60)) * 3
    params = parameters(shapes=shapes)
    optimizer = make("adam8bit", params)
    set_gradients(params, next(stream(1, shapes)))
    optimizer.step()
    assert set(optimizer.state[params[0]]) == {"step", "exp_avg", "exp_avg_sq"}


def test_embeddings_keep_full_states() -> None:
    model = llama(vocab_size=256, hidden_size=64)
    optimizer = steepest.create("adam8bit", model, lr=1e-3)
    optimizer.state_bytes()
    held = {name: optimizer.state[p] for name, p in model.named_parameters()}
    assert held["embed_tokens.weight"]["exp_avg"].dtype is torch.float32
    assert held["lm_head.weight"]["exp_avg"].dtype is torch.uint8


@pytest.mark.parametrize(
    ("name", "error"),
    [("muon", "elementwise"), ("adafactor", "elementwise"), ("signsgd", "whose states are none")],
)
def test_what_cannot_be_quantised(name: str, error: str) -> None:
    with pytest.raises(UserError, match=error):
        steepest.create(name, llama(), wrap="quantised")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_quantised_state_resumes_to_the_bit(dtype: torch.dtype) -> None:
    def run(params: list[nn.Parameter], optimizer: Any, first: int, last: int) -> None:
        for step, grads in enumerate(stream(last, LARGE)):
            if step >= first:
                set_gradients(params, grads)
                optimizer.step()

    whole, half = parameters(dtype, LARGE), parameters(dtype, LARGE)
    first, second = make("adam8bit", whole), make("adam8bit", half)
    run(whole, first, 0, 6)
    run(half, second, 0, 3)
    third = make("adam8bit", half)
    third.load_state_dict(second.state_dict())
    run(half, third, 3, 6)
    assert_same_bits(half, whole)


def test_quantised_runs_together_are_runs_apart() -> None:
    shapes = ((64, 80), (70, 61))
    apart = [parameters(shapes=shapes, seed=run) for run in range(2)]
    together = [
        nn.Parameter(torch.stack([p.detach() for p in ps])) for ps in zip(*apart, strict=True)
    ]
    groups = [{"params": together, "role": "hidden"}]
    both = steepest.create("adam8bit", groups, runs=2, lr=torch.tensor([1e-3, 1e-2]).double())
    each = [
        steepest.create("adam8bit", [{"params": ps, "role": "hidden"}], lr=lr)
        for ps, lr in zip(apart, (1e-3, 1e-2), strict=True)
    ]
    for grads in stream(4, shapes):
        set_gradients(together, [torch.stack([g, 2 * g]) for g in grads])
        both.step()
        for factor, ps, optimizer in zip((1, 2), apart, each, strict=True):
            set_gradients(ps, [factor * g for g in grads])
            optimizer.step()
    for run, ps in enumerate(apart):
        for a, b in zip(together, ps, strict=True):
            torch.testing.assert_close(a[run], b.detach(), rtol=1e-6, atol=1e-7)


@pytest.mark.slow
def test_quantised_and_compiled_is_eager() -> None:
    compiled, eager = parameters(torch.float64, LARGE), parameters(torch.float64, LARGE)
    for params, how in ((compiled, True), (eager, False)):
        optimizer = make("adam8bit", params, compile=how)
        for grads in stream(4, LARGE):
            set_gradients(params, grads)
            optimizer.step()
    for a, b in zip(compiled, eager, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def blocks_of(optimizer: steepest.Optimizer, model: nn.Module) -> dict[str, int]:
    optimizer.state_bytes()
    return {name: len(optimizer.state[p]["exp_avg_sq"]) for name, p in model.named_parameters()}


def test_blocks_of_adam_mini_are_heads_rows_tokens_or_all() -> None:
    model = llama()
    found = blocks_of(steepest.create("adam_mini", model), model)
    expected = {"q_proj": 2, "k_proj": 2}
    for name, p in model.named_parameters():
        leaf = name.split(".")[-2]
        assert found[name] == expected.get(leaf, len(p) if p.ndim == 2 else 1), name


class Attention(nn.Module):
    """Tells nothing of its heads."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)


class Fused(nn.Module):
    """Six query rows for each of two key and value rows."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.num_heads, self.head_dim = nn.Linear(5, 10, bias=False), 3, 2


def test_unknown_heads_are_asked_for() -> None:
    with pytest.raises(UserError, match=r"roles=\{NAME: NamedRole\(Role.HIDDEN, heads"):
        steepest.create("adam_mini", Attention())
    told: dict[str, Any] = {"q_proj.weight": NamedRole(Role.HIDDEN, heads=4)}
    model = Attention()
    found = blocks_of(steepest.create("adam_mini", model, roles=told), model)
    assert found == {"q_proj.weight": 4, "v_proj.weight": 8}
    with pytest.raises(UserError, match="heads"):
        steepest.create(
            "adam_mini", Attention(), roles={"q_proj.weight": NamedRole(Role.HIDDEN, heads=3)}
        )


def test_a_fused_matrix_has_a_block_per_head() -> None:
    model = Fused()
    assert blocks_of(steepest.create("adam_mini", model), model) == {"qkv.weight": 5}


def test_blocks_without_a_model() -> None:
    params = parameters(shapes=((6, 4), (5,)))
    optimizer = steepest.create("adam_mini", params)
    optimizer.state_bytes()
    assert [len(optimizer.state[p]["exp_avg_sq"]) for p in params] == [6, 1]
    with pytest.raises(UserError, match=r"\(6, 4\) can't be cut into 4 blocks"):
        steepest.create("adam_mini", params[:1], blocks=4).state_bytes()


def prodigy(params: list[nn.Parameter], **options: Any) -> Any:
    return steepest.create("prodigy", params, d0=1e-3, compile=False, **options)


def test_prodigy_at_lr_zero_changes_nothing() -> None:
    shapes = ((6, 4), (5,))
    waited, plain = parameters(shapes=shapes), parameters(shapes=shapes)
    first, second = prodigy(waited, lr=0.0), prodigy(plain)
    for grads in stream(3, shapes):
        set_gradients(waited, [g + 1 for g in grads])
        first.step()
    for group in first.param_groups:
        group["lr"] = 1.0
    for grads in stream(6, shapes):
        for params, optimizer in ((waited, first), (plain, second)):
            set_gradients(params, grads)
            optimizer.step()
    assert_same_bits(waited, plain)
    assert first.param_groups[0]["shared"]["count"] == 6


def test_prodigy_moves_nothing_before_a_gradient() -> None:
    shapes = ((6, 4), (5,))
    params = parameters(shapes=shapes)
    before = [p.detach().clone() for p in params]
    optimizer = prodigy(params, weight_decay=0.1, bias_correction=True)
    for _ in range(3):
        set_gradients(params, [torch.zeros_like(p) for p in params])
        optimizer.step()
    assert_same_bits(params, before)


def test_groups_of_prodigy_share_their_estimate() -> None:
    shapes = ((6, 4), (6, 4), (5,))
    one, two = parameters(shapes=shapes), parameters(shapes=shapes)
    first = prodigy(one)
    second = steepest.create(
        "prodigy", [{"params": two[:1]}, {"params": two[1:]}], d0=1e-3, compile=False
    )
    for grads in stream(8, shapes):
        for params, optimizer in ((one, first), (two, second)):
            set_gradients(params, grads)
            optimizer.step()
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert first.param_groups[0]["shared"]["d"] > 1e-3


@pytest.mark.parametrize(
    ("name", "options"),
    [("schedulefree_adamw", {"betas": (0.0, 0.9)}), ("schedulefree_sgd", {"momentum": 0.0})],
)
def test_schedule_free_needs_momentum(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="more than 0"):
        steepest.create(name, parameters(), **options).state_bytes()


def test_sophia_without_curvature_takes_signs() -> None:
    params = parameters(shapes=((6, 4),))
    before = params[0].detach().clone()
    optimizer = steepest.create("sophia_g", params, lr=0.5, weight_decay=0.0)
    set_gradients(params, [torch.zeros(6, 4)])
    optimizer.observe(batch_tokens=10)
    grads = next(stream(1, ((6, 4),)))
    set_gradients(params, grads)
    optimizer.step()
    torch.testing.assert_close(params[0].detach(), before - 0.5 * grads[0].sign())
    assert not optimizer.wants()


def test_a_schedule_of_sophia() -> None:
    params = parameters(shapes=((6, 4),))
    optimizer = steepest.create("sophia_g", params, update_interval=3)
    scheduler = LambdaLR(optimizer, cosine)
    wanted = []
    for grads in stream(8, ((6, 4),)):
        set_gradients(params, grads)
        wanted.append(bool(optimizer.wants()))
        sample(optimizer)
        optimizer.step()
        scheduler.step()
    assert wanted == [True, False, False] * 2 + [True, False]
