"""Documents to tokens, batch by batch, here or in worker processes, in the order they came."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from steepest.errors import UserError

if TYPE_CHECKING:
    from steepest.data.tokenizers import Tokenizer

HASHES = 2**64
"""Number of different content hashes."""

IN_FLIGHT = 3
"""Batches per worker that may be under way or wait to be taken: memory stays bounded."""

FEW = 8
"""Fewer batches than these are tokenized sooner here than workers start."""


@dataclass(frozen=True)
class Chosen:
    """Which documents are kept: those whose content hash is in [low, high)."""

    low: int = 0
    high: int = HASHES


@dataclass(frozen=True)
class Encoded:
    """The kept documents of a batch, each with its end-of-document token."""

    tokens: npt.NDArray[np.unsignedinteger]
    """Their tokens, one document after the other."""
    lengths: npt.NDArray[np.int64]
    """Tokens of each."""
    hashes: npt.NDArray[np.uint64]
    """Content hash of each."""
    sizes: npt.NDArray[np.int64]
    """UTF-8 bytes of each."""
    places: npt.NDArray[np.int64]
    """Where in the batch each was."""
    read: int
    """Documents of the batch, kept or not."""
    bytes_read: int
    """UTF-8 bytes of these."""

    def select(self, keep: npt.NDArray[np.bool_]) -> Encoded:
        """Return only those documents for which `keep` is true."""
        if keep.all():
            return self
        return Encoded(
            self.tokens[np.repeat(keep, self.lengths)],
            self.lengths[keep],
            self.hashes[keep],
            self.sizes[keep],
            self.places[keep],
            self.read,
            self.bytes_read,
        )


def nothing() -> Encoded:
    """Return what no documents give."""
    none = np.empty(0, np.int64)
    return Encoded(none.astype(np.uint16), none, none.astype(np.uint64), none, none, 0, 0)


Encode = Callable[[Sequence[str], Chosen], Encoded]
EncodeAll = Callable[[Iterable[Sequence[str]], Chosen], Iterator[Encoded]]


def content_hash(text: str) -> int:
    """Return the first 8 bytes of the SHA-256 of a text in UTF-8, as a big-endian number."""
    return _hash(text.encode())


def encode(tokenizer: Tokenizer, texts: Sequence[str], chosen: Chosen) -> Encoded:
    """Tokenize the chosen ones of some texts.

    Raises UserError if the tokenizer gives an id outside its vocabulary, or fails.
    """
    data = [text.encode() for text in texts]
    hashes = [_hash(one) for one in data]
    places = [i for i, value in enumerate(hashes) if chosen.low <= value < chosen.high]
    try:
        ids = tokenizer.encode_batch([texts[i] for i in places]) if places else []
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"Tokenizer {tokenizer.name} failed with {type(error).__name__}: {error}"
        ) from error
    end = np.array([tokenizer.end])
    tokens = np.concatenate([part for one in ids for part in (one, end)] or [end[:0]])
    if len(tokens) and not 0 <= tokens.min() <= tokens.max() < tokenizer.vocab_size:
        raise UserError(
            f"Tokenizer {tokenizer.name} gave the id {tokens.max()}, but its vocabulary has "
            f"{tokenizer.vocab_size:,} entries."
        )
    return Encoded(
        tokens.astype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4"),
        np.array([len(one) + 1 for one in ids], dtype=np.int64),
        np.array([hashes[i] for i in places], dtype=np.uint64),
        np.array([len(data[i]) for i in places], dtype=np.int64),
        np.array(places, dtype=np.int64),
        len(texts),
        sum(map(len, data)),
    )


@contextmanager
def encoders(tokenizer: Tokenizer, saved: Path, workers: int) -> Iterator[EncodeAll]:
    """Yield a function that tokenizes batches in order, in `workers` processes (1: in this one).

    What it returns does not depend on `workers`. `saved` is where the tokenizer was saved, from
    where the workers load it.
    """
    if workers == 1:
        yield partial(_in_turn, partial(encode, tokenizer))
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(
        workers, context, initializer=_start, initargs=(saved, tokenizer.fingerprint)
    )
    try:
        yield partial(_side_by_side, partial(encode, tokenizer), pool, IN_FLIGHT * workers)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big")


def _in_turn(
    encode_here: Encode, batches: Iterable[Sequence[str]], chosen: Chosen
) -> Iterator[Encoded]:
    for texts in batches:
        yield encode_here(texts, chosen)


def _side_by_side(
    encode_here: Encode,
    pool: Executor,
    bound: int,
    batches: Iterable[Sequence[str]],
    chosen: Chosen,
) -> Iterator[Encoded]:
    batches = iter(batches)
    first = list(islice(batches, FEW))
    if len(first) < FEW:
        yield from _in_turn(encode_here, first, chosen)
        return
    under_way: deque[Future[Encoded]] = deque()
    try:
        for texts in chain(first, batches):
            under_way.append(pool.submit(_work, texts, chosen))
            if len(under_way) >= bound:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    except BrokenProcessPool:
        raise UserError(
            "A tokenizing process was killed, perhaps for want of memory; the same command "
            "continues from the last complete shard, with fewer --workers if need be."
        ) from None
    finally:
        for future in under_way:
            future.cancel()


_tokenizer: Any = None


def _start(saved: Path, fingerprint: str) -> None:
    """Make a worker ready: one thread, the tokenizer loaded, and an end with its parent."""
    global _tokenizer  # noqa: PLW0603 - how a pool's initializer hands over an object
    from steepest.data.tokenizers import load_tokenizer

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends the pool
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # Read by Rust tokenizers at their first batch.
    os.environ.update(TOKENIZERS_PARALLELISM="false", RAYON_NUM_THREADS="1")
    _tokenizer = load_tokenizer(saved)
    assert _tokenizer.fingerprint == fingerprint, f"another tokenizer is in {saved}"


def _end_with_parent() -> None:
    """End this worker when its parent is killed, which would otherwise leave it waiting."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(texts: Sequence[str], chosen: Chosen) -> Encoded:
    return encode(_tokenizer, texts, chosen)
