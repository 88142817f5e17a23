"""Filling in a config what only the files it names can tell: their content hashes."""

from __future__ import annotations

import dataclasses

from steepest.data import TokenData
from steepest.errors import UserError
from steepest.train import optimizers
from steepest.train.config import RunConfig
from steepest.train.identity import is_class


def is_resolved(config: RunConfig) -> bool:
    """Return whether the config has a hash: everything it names is pinned by content."""
    own_class = is_class(config.optimizer.name)
    return bool(config.data.fingerprint and (config.optimizer.source_sha256 or not own_class))


def resolve(config: RunConfig, token_data: TokenData) -> RunConfig:
    """Return the config with `data.fingerprint` and `optimizer.source_sha256` filled in.

    Raises UserError if the config has one of them already and the content is another now.
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
            source_sha256=_pinned(
                "optimizer.source_sha256",
                config.optimizer.source_sha256,
                optimizers.source_sha256(config.optimizer.name),
            ),
        ),
    )


def _pinned(key: str, wanted: str, found: str) -> str:
    if wanted and wanted != found:
        raise UserError(
            f"{key} is {wanted} in the config, but the content is {found or 'none'} now; "
            f"remove {key} from the config to run the new content."
        )
    return found
