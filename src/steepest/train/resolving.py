"""Filling in a config what it leaves to defaults or to the files it names."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import steepest
from steepest.data import TokenData, open_tokens, prepare
from steepest.errors import UserError
from steepest.train import optimizers
from steepest.train.config import DataConfig, OptimizerConfig, Option, RunConfig
from steepest.train.identity import is_class


def open_data(config: DataConfig) -> TokenData:
    """Return the tokens that a config names: a prepared folder, or a corpus to prepare now.

    Raises UserError for a corpus that cannot be used and for a vocabulary of another size.
    """
    folder = Path(config.corpus).expanduser()
    if not (folder / "index.json").is_file():
        return prepare(config.corpus, config.vocab_size)
    tokens = open_tokens(folder)
    if tokens.vocab_size > config.vocab_size:
        raise UserError(
            f"The tokens in {folder} are of a vocabulary of {tokens.vocab_size:,} "
            f"({tokens.tokenizer}), but data.vocab_size and model.vocab_size are "
            f"{config.vocab_size:,}; they must be at least as large."
        )
    return tokens


def is_resolved(config: RunConfig) -> bool:
    """Return whether the config has a hash: everything it names is pinned by content."""
    own_class = is_class(config.optimizer.name)
    return bool(config.data.fingerprint and (config.optimizer.source_sha256 or not own_class))


def resolve(config: RunConfig, token_data: TokenData) -> RunConfig:
    """Return the config with all that was left to defaults or named by place filled in.

    That is `data.fingerprint`, `optimizer.source_sha256`, every hyperparameter of an optimizer of
    the catalogue, so that a run keeps its meaning when a default changes, and the number of steps
    where an optimizer declares to need it.

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
            options=_all_options(config.optimizer, config.training.steps),
            source_sha256=_pinned(
                "optimizer.source_sha256",
                config.optimizer.source_sha256,
                optimizers.source_sha256(config.optimizer.name),
            ),
        ),
    )


def _all_options(config: OptimizerConfig, steps: int) -> dict[str, Option]:
    """Return the hyperparameters given, and the defaults of the rest for the catalogue's names.

    What is to be as long as the training is `steps`. A hyperparameter that is None by default,
    which TOML cannot say, or infinite is left out.
    """
    lengths: dict[str, Option] = dict.fromkeys(
        sorted(optimizers.total_steps_options(config.name)), steps
    )
    if is_class(config.name):
        return lengths | config.options
    defaults = steepest.describe(config.name).hyperparameters
    return (
        lengths
        | {
            name: list(value) if isinstance(value, tuple) else value
            for name, (value, _) in defaults.items()
            if value is not None and value != math.inf and name != "lr"
        }
        | config.options
    )


def _pinned(key: str, wanted: str, found: str) -> str:
    if wanted and wanted != found:
        raise UserError(
            f"{key} is {wanted} in the config, but the content is {found or 'none'} now; "
            f"remove {key} from the config to run the new content."
        )
    return found
