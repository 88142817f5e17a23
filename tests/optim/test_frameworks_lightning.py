"""Lightning: an optimizer of ours does there what it does in a loop."""

from __future__ import annotations

import warnings
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
