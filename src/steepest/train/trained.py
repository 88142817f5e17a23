"""A trained model, read back from the folder of its run: weights and tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from steepest import models
from steepest.data.tokenizer_files import open_path
from steepest.data.tokenizers import Tokenizer, load_tokenizer
from steepest.errors import UserError
from steepest.train import checkpoints, evaluation, optimizers, precision
from steepest.train.config import DataConfig, RunConfig
from steepest.train.folder import RunFolder
from steepest.train.identity import is_class, is_file
from steepest.train.resolving import is_resolved, open_data

Kind = Literal["training", "evaluation"]


@dataclass(frozen=True)
class Trained:
    """A model at a checkpoint."""

    config: RunConfig
    step: int
    weights: dict[str, Tensor]
    """State dict of the model, on the CPU, in the dtype in which the run keeps it; what that keeps
    in int8 is in float32."""

    def model(self) -> models.LanguageModel:
        """Return the model in float32, ready to be evaluated."""
        model = models.build(self.config.model)
        model.load_state_dict(self.weights)
        return model.eval()


def read(place: Path, kind: Kind = "evaluation") -> Trained:
    """Read a checkpoint, or the newest one of the run in a folder.

    "evaluation" are the weights that the run evaluates: averages, for an optimizer that has them,
    or else those in training. Nothing but tensors and plain values is unpickled, and no file is
    executed. Raises UserError if there is no readable checkpoint, if it is not of the run whose
    config.toml lies above it, and if its evaluation weights are not known.
    """
    path = _newest(RunFolder(place)) if place.is_dir() else place
    if not path.is_file():
        raise UserError(f"{path} is neither a checkpoint nor the folder of a run.")
    config = RunConfig.from_toml(RunFolder(path.parent.parent).config)
    state = checkpoints.load(path)
    if not (is_resolved(config) and state.get("hash") == config.hash()):
        raise UserError(f"{path} is not a checkpoint of the run in {path.parent.parent}.")
    step = state["step"]
    weights = (
        state["learner"]["model"] if kind == "training" else _evaluation_weights(state, config)
    )
    return Trained(config, step, {key: precision.floats(w) for key, w in weights.items()})


def open_tokenizer(config: DataConfig) -> Tokenizer:
    """Return the tokenizer of a run's tokens.

    Raises UserError if the corpus is not there or not what it was when the run began.
    """
    tokens = open_data(config)
    place = tokens.tokenizer_path
    if tokens.fingerprint == config.fingerprint:
        tokenizer = (
            load_tokenizer(place)
            if place.is_dir()
            else open_path(place, name=tokens.tokenizer, end=None)
        )
        if tokenizer.fingerprint == tokens.tokenizer_fingerprint:
            return tokenizer
    raise UserError(
        f"The corpus {config.corpus} or its tokenizer is not the one that the run was trained on; "
        f"restore that, whose fingerprint is {config.fingerprint}."
    )


def _newest(run: RunFolder) -> Path:
    found = checkpoints.newest(run.checkpoints)
    if found is None:
        raise UserError(f"{run.path} holds no checkpoints/step-*.pt; give the folder of a run.")
    return found


def _evaluation_weights(state: dict[str, Any], config: RunConfig) -> dict[str, Tensor]:
    """Return what a checkpoint has of them, or what the optimizer makes of its state."""
    weights: dict[str, Tensor] = state["learner"]["model"]
    if "evaluation_model" in state:
        averages: dict[str, Tensor] = state["evaluation_model"]
        return averages
    if state["step"] == config.training.steps:
        return weights  # a last checkpoint has others if there are any
    name = config.optimizer.name
    if is_class(name) and is_file(name.rpartition(":")[0]):
        raise UserError(
            f"Whether {name} evaluates other weights than those in training is not known without "
            "running its code; choose the training weights, or the checkpoint of the last step."
        )
    dtype = precision.weight_dtype(config.training.precision)
    model = models.build(config.model).to(dtype)
    model.load_state_dict(weights)
    optimizer = optimizers.build(
        config.optimizer,
        model,
        seed=config.training.seed,
        wrap=precision.WRAPPERS.get(config.training.precision, ()),
    )
    if not evaluation.has_modes(optimizer):
        return weights
    checkpoints.load_optimizer(optimizer, state["learner"]["optimizer"])
    with evaluation.evaluation_weights(model, optimizer):
        return {key: weight.clone() for key, weight in model.state_dict().items()}
