"""Documents packed into one sequence: where each token stands in its own, and what it may see.

Everywhere `documents` is int32 [batch, time]: numbers that are equal for neighbours of the same
document and differ from one document to the next.
"""

from __future__ import annotations

import torch
from torch import Tensor


def starts(documents: Tensor) -> Tensor:
    """Return bool [batch, time]: whether a token is the first of its document in the sequence."""
    first = torch.ones_like(documents[:, :1], dtype=torch.bool)
    return torch.cat((first, documents[:, 1:] != documents[:, :-1]), dim=1)


def begins(documents: Tensor) -> Tensor:
    """Return int64 [batch, time]: where in its row the document of every token begins."""
    index = torch.arange(documents.shape[1], device=documents.device)
    return torch.where(starts(documents), index, 0).cummax(dim=1).values


def positions(documents: Tensor) -> Tensor:
    """Return int64 [batch, time]: the position of every token in its document, from 0."""
    return torch.arange(documents.shape[1], device=documents.device) - begins(documents)


def segments(documents: Tensor) -> Tensor:
    """Return int64 [batch, time]: the documents of every sequence counted from 1.

    Equal numbers mean the same document, which holds for `documents` between neighbours alone.
    """
    return starts(documents).cumsum(dim=1)


def mask(documents: Tensor) -> Tensor:
    """Return bool [batch, 1, time, time]: whether a token (row) sees another (column).

    It sees those of its own document up to itself.
    """
    number = segments(documents)
    same = number[:, :, None] == number[:, None, :]
    return same.tril()[:, None]
