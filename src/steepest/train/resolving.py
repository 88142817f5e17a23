"""Filling in a config what it leaves to defaults or to the files it names."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import torch

import steepest
from steepest.data import TokenData, open_tokens, prepare
from steepest.data.shards import is_prepared
from steepest.errors import UserError
from steepest.train import optimizers, precision
from steepest.train.batch_size import steps_taken
from steepest.train.config import DataConfig, Option, RunConfig
from steepest.train.identity import is_class


def open_data(config: DataConfig) -> TokenData:
    """Return the tokens that a config names: a prepared folder, or a corpus to prepare now.

    Raises UserError for a corpus that cannot be used and for a vocabulary larger than the config's.
    """
    folder = Path(config.corpus).expanduser()
    if not is_prepared(folder):
        return prepare(config.corpus, config.vocab_size)
    tokens = open_tokens(folder)
    if tokens.vocab_size > config.vocab_size:
        raise UserError(
            f"The tokens in {folder} are of a vocabulary of {tokens.vocab_size:,} "
            f"({tokens.tokenizer}), but data.vocab_size is {config.vocab_size:,}; set it to "
            f"{tokens.vocab_size}, and model.vocab_size to as much or more."
        )
    return tokens


def is_resolved(config: RunConfig) -> bool:
    """Return whether the config has a hash: everything it names is pinned by content."""
    own_class = is_class(config.optimizer.name)
    return bool(
        config.data.fingerprint
        and config.training.precision != "auto"
        and (config.optimizer.source_sha256 or not own_class)
    )


def resolve(
    config: RunConfig, token_data: TokenData, device: torch.device | None = None
) -> RunConfig:
    """Return the config with all that was left to defaults or named by place filled in.

    That is `data.fingerprint`, `optimizer.source_sha256`, every hyperparameter of an optimizer of
    the catalogue, so that a run keeps its meaning when a default changes, the number of steps
    where an optimizer declares to need it, and the precision where it is left to the device, which
    is the CPU if not given.

    Raises UserError if the config has a fingerprint or digest already and the content is another
    now.
    """
    return dataclasses.replace(
        config,
        data=dataclasses.replace(
            config.data,
            fingerprint=_pinned(
                "data.fingerprint", config.data.fingerprint, token_data.fingerprint
            ),
        ),
        optimizer=dataclasses.replace(
            config.optimizer,
            options=_all_options(config),
            source_sha256=_pinned(
                "optimizer.source_sha256",
                config.optimizer.source_sha256,
                optimizers.source_sha256(config.optimizer.name),
            ),
        ),
        training=dataclasses.replace(
            config.training,
            precision=precision.on(device or torch.device("cpu"), config.training.precision),
        ),
    )


def _all_options(config: RunConfig) -> dict[str, Option]:
    """Return the hyperparameters given, and the defaults of the rest for the catalogue's names.

    What is to be as long as the training is its number of steps. A hyperparameter that is None by
    default, which TOML cannot say, or infinite is left out.
    """
    name, options = config.optimizer.name, config.optimizer.options
    steps = steps_taken(
        config.batch, batch_size=config.data.batch_size, steps=config.training.steps
    )
    lengths: dict[str, Option] = dict.fromkeys(sorted(optimizers.total_steps_options(name)), steps)
    if is_class(name):
        return lengths | options
    defaults = steepest.describe(name).hyperparameters
    return (
        lengths
        | {
            key: list(value) if isinstance(value, tuple) else value
            for key, (value, _) in defaults.items()
            if value is not None and value != math.inf and key != "lr"
        }
        | options
    )


def _pinned(key: str, wanted: str, found: str) -> str:
    if wanted and wanted != found:
        raise UserError(
            f"{key} is {wanted} in the config, but the content is {found or 'none'} now; "
            f"remove {key} from the config to run the new content."
        )
    return found
