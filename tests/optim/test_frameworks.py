"""Trainers and schedulers of others: an optimizer of ours does there what it does in a loop.

Models are made from configurations, so that nothing is downloaded. The frameworks are imported
where they are used, because that takes seconds.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import problems
import pytest
import torch
from engine import assert_same_bits
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader

import steepest

OPTIONS: dict[str, dict[str, Any]] = {
    "adamw": {"lr": 1e-2, "weight_decay": 0.1},
    "muon": {"lr": 0.02, "adam_lr": 1e-2, "ns_dtype": "float32"},
    "schedulefree_adamw": {"lr": 1e-2},
}
every = pytest.mark.parametrize("name", OPTIONS)
STEPS, MIDDLE = 6, 3


def make(name: str, model: nn.Module, **options: Any) -> steepest.Optimizer:
    return steepest.create(name, model, **{**OPTIONS[name], **options})


def decline(optimizer: Any) -> lr_scheduler.LambdaLR:
    return lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / (2 * STEPS))


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def moved_alike(ours: Sequence[Tensor], theirs: Sequence[Tensor], start: Sequence[Tensor]) -> None:
    for a, b, p0 in zip(ours, theirs, start, strict=True):
        assert (b - p0).norm() > 0
        assert (a - b).norm() <= 1e-5 * (b - p0).norm()


# torch: schedulers, autocast, scaler, hooks.

SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": decline,
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(
        o,
        max_lr=[0.05 * group["lr"] / o.param_groups[0]["lr"] for group in o.param_groups],
        total_steps=10,
        cycle_momentum="betas" in o.defaults,
    ),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=8, eta_min=1e-4),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o,
        [
            lr_scheduler.LinearLR(o, start_factor=0.1, total_iters=3),
            lr_scheduler.ExponentialLR(o, gamma=0.8),
        ],
        milestones=[3],
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.3, patience=1),
}


def scheduled(optimizer: Any, model: Any, schedule: Callable[[Any], Any]) -> list[list[float]]:
    """Train under a schedule; return the learning rates of all groups at each step."""
    scheduler, rates = schedule(optimizer), []
    for batch in problems.batches(count=8):
        problems.backward(model, batch)
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
            scheduler.step(1.0)
        else:
            scheduler.step()
    return rates


@pytest.mark.parametrize("kind", SCHEDULES)
def test_adamw_under_a_schedule_is_torchs(kind: str) -> None:
    ours, theirs = problems.llama(), problems.llama()
    start = weights(ours)
    options = {"lr": 1e-2, "weight_decay": 0.1}
    # Decay of all parameters in one group, as torch's.
    optimizer = steepest.create("adamw", ours, **options, decay_roles=list(steepest.Role))
    rates = scheduled(optimizer, ours, SCHEDULES[kind])
    torchs = torch.optim.AdamW(theirs.parameters(), **options)
    assert scheduled(torchs, theirs, SCHEDULES[kind]) == rates
    assert len({rate for step in rates for rate in step}) > 2
    moved_alike(weights(ours), weights(theirs), start)


@pytest.mark.parametrize("kind", SCHEDULES)
def test_muon_under_a_schedule_is_muon_with_its_learning_rates(kind: str) -> None:
    model, by_hand = problems.llama(), problems.llama()
    rates = scheduled(make("muon", model), model, SCHEDULES[kind])
    other = make("muon", by_hand)
    for batch, now in zip(problems.batches(count=8), rates, strict=True):
        problems.backward(by_hand, batch)
        for group, rate in zip(other.param_groups, now, strict=True):
            group["lr"] = rate
        other.step()
    assert_same_bits(weights(model), weights(by_hand))
    first, last = rates[0], rates[-1]
    assert first != last
    if kind in ("LambdaLR", "OneCycleLR", "ReduceLROnPlateau"):  # Groups keep their proportions.
        assert last[1] / last[0] == pytest.approx(first[1] / first[0])


@every
def test_autocast_without_a_scaler(name: str) -> None:
    model = problems.llama()
    optimizer = make(name, model)
    losses = []
    for batch in problems.batches(count=1) * 25:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model.loss(*batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1
    held = [v for own in optimizer.state.values() for v in own.values() if torch.is_tensor(v)]
    for tensor in [*model.parameters(), *held]:
        assert tensor.dtype == torch.float32
        assert tensor.isfinite().all()


@every
def test_a_grad_scaler_changes_nothing_and_skips_what_overflows(name: str) -> None:
    model, plain = problems.llama(), problems.llama()
    optimizer, other = make(name, model), make(name, plain)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for batch in problems.batches(count=3):
        problems.backward(plain, batch)
        other.step()
        optimizer.zero_grad()
        scaler.scale(model.loss(*batch)).backward()
        scaler.step(optimizer)
        scaler.update()
    assert_same_bits(weights(model), weights(plain))
    model.lm_head.weight.grad[0, 0] = torch.inf
    before = weights(model)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 512.0
    assert_same_bits(weights(model), before)


def test_hooks_of_torch() -> None:
    model = problems.llama()
    optimizer = make("muon", model)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    optimizer.register_state_dict_post_hook(lambda *_: calls.append("saved"))
    optimizer.register_load_state_dict_post_hook(lambda *_: calls.append("loaded"))
    problems.backward(model, problems.batches()[0])
    optimizer.step()
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert calls == ["before", "after", "saved", "loaded"]


# Frameworks. Each trains the same tiny LLaMA of Hugging Face on the same sequences.


def sequences() -> list[dict[str, Tensor]]:
    batches = problems.batches(count=2 * STEPS, rows=4)
    rows = [row for tokens, _ in batches for row in tokens]
    return [{"input_ids": row, "labels": row} for row in rows]


def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    return LlamaForCausalLM(config)


def loop(
    name: str,
    batches: Iterable[dict[str, Tensor]],
    *,
    clip: float | None = None,
    accumulate: int = 1,
    autocast: bool = False,
) -> Any:
    """Return the model that a plain loop trains."""
    model = llama()
    optimizer = make(name, model)
    scheduler = decline(optimizer)
    for count, batch in enumerate(batches, start=1):
        with torch.autocast("cpu", dtype=torch.bfloat16) if autocast else nullcontext():
            loss = model(**batch).loss
        (loss / accumulate).backward()
        if count % accumulate:
            continue
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return model


@pytest.fixture
def accelerate() -> Iterator[Any]:
    """Return the package, whose state is the process's: cleared for each test."""
    import accelerate
    from accelerate.state import AcceleratorState, GradientState

    yield accelerate
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def trainer(name: str, folder: Path, seen: list[Any], **arguments: Any) -> Any:
    """Return a Trainer of Hugging Face that notes its batches."""
    import transformers

    def noted(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        seen.append(collate(rows))
        return seen[-1]

    model = llama()
    optimizer = make(name, model)
    wanted = {
        "output_dir": str(folder),
        "use_cpu": True,
        "per_device_train_batch_size": 4,
        "max_steps": STEPS,
        "max_grad_norm": 0.5,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(**{**wanted, **arguments}),
        train_dataset=sequences(),
        eval_dataset=sequences()[:4],
        data_collator=noted,
        optimizers=(optimizer, decline(optimizer)),
    )


@pytest.mark.slow
@pytest.mark.usefixtures("accelerate")
@pytest.mark.parametrize("bf16", [False, True])
@every
def test_trainer_of_hugging_face_is_a_loop(name: str, bf16: bool, tmp_path: Path) -> None:
    seen: list[Any] = []
    accumulate = 1 if bf16 else 2
    its = trainer(name, tmp_path, seen, bf16=bf16, gradient_accumulation_steps=accumulate)
    its.train()
    used = seen[: STEPS * accumulate]
    by_hand = loop(name, used, clip=0.5, accumulate=accumulate, autocast=bf16)
    moved_alike(weights(its.model), weights(by_hand), weights(llama()))


@pytest.mark.slow
@pytest.mark.usefixtures("accelerate")
@every
def test_trainer_of_hugging_face_evaluates_saves_and_resumes(name: str, tmp_path: Path) -> None:
    often = {"eval_strategy": "steps", "eval_steps": MIDDLE}
    saving = {**often, "save_strategy": "steps", "save_steps": MIDDLE}
    whole = trainer(name, tmp_path, [], **saving)
    whole.train()
    resumed = trainer(name, tmp_path / "other", [], **often)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{MIDDLE}"))
    assert resumed.state.global_step == STEPS
    assert_same_bits(weights(resumed.model), weights(whole.model))
    losses = [log["eval_loss"] for log in whole.state.log_history if "eval_loss" in log]
    assert losses[1] < losses[0]


@pytest.mark.slow
@every
def test_accelerate_is_a_loop_and_resumes(name: str, tmp_path: Path, accelerate: Any) -> None:
    def prepared(*, model_first: bool) -> Any:
        model = llama()
        optimizer = make(name, model)
        parts: list[Any] = [model, optimizer, decline(optimizer)]
        if model_first:
            return own.prepare(*parts)
        return own.prepare(*reversed(parts))[::-1]

    def train(parts: Any, batches: Iterable[dict[str, Tensor]]) -> None:
        model, optimizer, scheduler = parts
        for batch in batches:
            with own.accumulate(model):
                own.backward(model(**batch).loss)
                if own.sync_gradients:
                    own.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()

    own = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    batches = list(DataLoader(sequences(), batch_size=4, collate_fn=collate))
    parts = prepared(model_first=False)
    train(parts, batches[: 2 * MIDDLE])
    own.save_state(str(tmp_path / "state"))
    train(parts, batches[2 * MIDDLE :])
    model = parts[0]
    by_hand = loop(name, batches, clip=0.5, accumulate=2)
    moved_alike(weights(model), weights(by_hand), weights(llama()))
    own.free_memory()
    parts = prepared(model_first=True)
    own.load_state(str(tmp_path / "state"))
    train(parts, batches[2 * MIDDLE :])
    assert_same_bits(weights(parts[0]), weights(model))


def lightning_module(name: str, *, by_hand: bool = False) -> Any:
    import pytorch_lightning as lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = llama()
            self.automatic_optimization = not by_hand

        def training_step(self, batch: dict[str, Tensor], index: int) -> Any:
            if not by_hand:
                return self.model(**batch).loss
            optimizer: Any = self.optimizers()
            optimizer.train()
            self.manual_backward(self.model(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
            optimizer.eval()
            return None

        def configure_optimizers(self) -> Any:
            optimizer = make(name, self.model)
            if by_hand:
                return optimizer
            schedule = {"scheduler": decline(optimizer), "interval": "step"}
            return {"optimizer": optimizer, "lr_scheduler": schedule}

    return Module()


def fit(
    module: Any,
    folder: Path,
    batches: int = 2 * STEPS,
    resume: Path | None = None,
    **options: Any,
) -> Any:
    import pytorch_lightning as lightning

    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    its = lightning.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        **{"max_epochs": 1, "max_steps": STEPS, **quiet, **options},
    )
    loader = DataLoader(sequences()[: 4 * batches], batch_size=4, collate_fn=collate)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # On the number of workers of the loader.
        its.fit(module, loader, ckpt_path=resume)
    return its


@pytest.mark.slow
@pytest.mark.parametrize("bf16", [False, True])
@every
def test_lightning_is_a_loop(name: str, bf16: bool, tmp_path: Path) -> None:
    module = lightning_module(name)
    accumulate = 1 if bf16 else 2
    fit(
        module,
        tmp_path,
        gradient_clip_val=0.5,
        accumulate_grad_batches=accumulate,
        precision="bf16-mixed" if bf16 else "32-true",
    )
    batches = list(DataLoader(sequences(), batch_size=4, collate_fn=collate))
    used = batches[: STEPS * accumulate]
    by_hand = loop(name, used, clip=0.5, accumulate=accumulate, autocast=bf16)
    moved_alike(weights(module.model), weights(by_hand), weights(llama()))


@pytest.mark.slow
@every
def test_lightning_resumes(name: str, tmp_path: Path) -> None:
    from pytorch_lightning.callbacks import ModelCheckpoint

    # After whole epochs: within one, Lightning starts the loader anew.
    epochs = {"batches": MIDDLE, "max_epochs": 2, "max_steps": -1}
    saving = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    whole, resumed = lightning_module(name), lightning_module(name)
    fit(whole, tmp_path, **epochs, callbacks=[saving], enable_checkpointing=True)
    its = fit(resumed, tmp_path, **epochs, resume=tmp_path / "epoch=0.ckpt")
    assert its.global_step == STEPS
    assert_same_bits(weights(resumed.model), weights(whole.model))


@pytest.mark.slow
def test_lightning_with_evaluation_weights_between_steps(tmp_path: Path) -> None:
    module = lightning_module("schedulefree_adamw", by_hand=True)
    fit(module, tmp_path)
    model = llama()
    optimizer = make("schedulefree_adamw", model)
    for batch in list(DataLoader(sequences(), batch_size=4, collate_fn=collate))[:STEPS]:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.eval()
    moved_alike(weights(module.model), weights(model), weights(llama()))
