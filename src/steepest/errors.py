"""Errors that a person can act on: one sentence, with the nearest right name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Wrong input. Its message is a sentence; the command line prints it and exits with 2."""


def unknown(kind: str, name: str, valid: Iterable[str]) -> UserError:
    """Return the error for a name that is not one of `valid`.

    >>> str(unknown("optimizer", "adanw", ["adamw", "lion"]))
    "Unknown optimizer 'adanw'; did you mean 'adamw'?"
    """
    names = sorted(valid)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}?" if close else f"the valid names are {', '.join(names)}."
    return UserError(f"Unknown {kind} {name!r}; {hint}")
