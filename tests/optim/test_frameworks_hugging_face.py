"""Hugging Face: in Trainer and Accelerate an optimizer of ours does what it does in a loop."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from engine import assert_same_bits
from frameworks import (
    MIDDLE,
    OPTIONS,
    STEPS,
    collate,
    decline,
    llama,
    loop,
    make,
    moved_alike,
    sequences,
    weights,
)
from torch import Tensor
from torch.utils.data import DataLoader

every = pytest.mark.parametrize("name", OPTIONS)


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
