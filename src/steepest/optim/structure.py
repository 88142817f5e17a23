"""What a model's structure tells: where a parameter is, the vocabulary, and the output layers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn

OUTPUT_NAMES = frozenset(
    {"lm_head", "head", "output", "output_layer", "unembed", "unembedding", "embed_out", "decoder"}
    | {"logits", "to_logits", "classifier", "score", "value_head"}
)
"""Names of output layers, in lower case. A name alone decides nothing without a doubt."""
POSITIONS = re.compile(r"(^|[._])(pos|wpe|token_type|segment)")
"""Names of tables whose rows are not a vocabulary's."""

VOCABULARY_SIZES = ("vocab_size",)
CLASS_COUNTS = ("num_labels", "num_classes")
"""Attributes, of a module or its config, that give the rows of an output layer."""


@dataclass(frozen=True)
class Place:
    """Where a parameter is."""

    path: str
    name: str
    module: nn.Module
    parent: nn.Module | None
    parameter: nn.Parameter
    in_block: bool
    """Whether it belongs to one of a model's numbered layers, or to an attention layer of torch."""

    @property
    def full_name(self) -> str:
        return f"{self.path}.{self.name}" if self.path else self.name

    @property
    def kind(self) -> str:
        return type(self.module).__name__

    @property
    def leaf(self) -> str:
        return self.path.rpartition(".")[2].lower()

    @property
    def is_weight(self) -> bool:
        """Whether it is a layer's weight, not a parameter that a module holds beside its layers."""
        return self.name.endswith("weight")

    @property
    def is_table(self) -> bool:
        """Whether its rows are looked up by index."""
        return isinstance(self.module, (nn.Embedding, nn.EmbeddingBag))

    @property
    def transposed(self) -> bool:
        """Whether it is stored [in, out], as by the Conv1D of transformers."""
        return "Conv1D" in kinds(self.module) and hasattr(self.module, "nf")

    @property
    def sides(self) -> tuple[int, int]:
        """Rows and columns of a matrix, [out, in]."""
        first, second = self.parameter.shape[:2]
        return (second, first) if self.transposed else (first, second)


@dataclass(frozen=True)
class Output:
    """Whether a matrix is an output layer, and why."""

    found: bool
    reason: str = ""
    doubt: str = ""


@dataclass(frozen=True)
class Structure:
    """What a model says about itself as a whole. Parameters are given by identity."""

    places: tuple[Place, ...]
    inputs: frozenset[int]
    """Parameters of what `get_input_embeddings` of the model and of its parts returns."""
    outputs: frozenset[int]
    """Parameters of what `get_output_embeddings` of them returns."""
    tables: frozenset[int]
    """Rows of all tables but those of positions."""
    vocabulary: frozenset[int]
    """Sizes that configs give, and the largest of those of tables."""
    classes: frozenset[int]
    """Numbers of classes that modules or configs give."""

    @classmethod
    def of(cls, model: nn.Module) -> Structure:
        """Return the structure of a model."""
        tables = frozenset(
            module.num_embeddings
            for path, module in model.named_modules()
            if isinstance(module, nn.Embedding) and not POSITIONS.search(path.lower())
        )
        vocabulary = _sizes(model, VOCABULARY_SIZES) | ({max(tables)} if tables else set())
        return cls(
            tuple(_places(model, vocabulary)),
            _answers(model, "get_input_embeddings"),
            _answers(model, "get_output_embeddings"),
            tables,
            vocabulary,
            _sizes(model, CLASS_COUNTS),
        )

    def output(self, place: Place) -> Output:
        """Say whether a tensor of two and more dimensions is the weight of an output layer.

        What the model returns as its output embeddings is. So is a matrix outside of the numbered
        layers with as many rows as the vocabulary, and the last one with as many as there are
        classes. Where only its name or its place speaks for it, that is a doubt.
        """
        if id(place.parameter) in self.outputs:
            return Output(True, "the model's output embeddings")
        if not place.is_weight:
            return Output(False)
        return self._in_block(place) if place.in_block else self._outside(place)

    def _outside(self, place: Place) -> Output:
        rows, last = place.sides[0], place.parameter is self._last
        if _fits(place, self.vocabulary | self.tables if last else self.vocabulary):
            return Output(True, f"{rows} rows, as many as the vocabulary")
        if last and rows in self.classes:
            return Output(True, f"the last layer, with {rows} rows for as many classes")
        if place.leaf not in OUTPUT_NAMES:
            may_be = "it is the last layer, so it may be an output layer"
            return Output(False, doubt=may_be if last else "")
        if last:
            doubt = "only its name and its place tell that it is an output layer"
            return Output(True, f"the last layer, named {place.path!r}", doubt)
        return Output(False, doubt="its name is one of output layers")

    def _in_block(self, place: Place) -> Output:
        rows, columns = place.sides
        if rows not in self.vocabulary or columns in self.vocabulary:
            return Output(False)
        # A model whose head is elsewhere may have hidden layers of any size.
        if self._has_head and "head" not in place.path.lower():
            return Output(False)
        return Output(False, doubt="it has as many rows as an embedding, like an output layer")

    def is_first(self, place: Place) -> bool:
        """Whether no other tensor of two and more dimensions comes before."""
        return place.parameter is next(p.parameter for p in self.places if p.parameter.ndim > 1)

    @cached_property
    def _last(self) -> nn.Parameter | None:
        layers = (p for p in reversed(self.places) if p.is_weight and not p.is_table)
        return next((p.parameter for p in layers if p.parameter.ndim > 1), None)

    @cached_property
    def _has_head(self) -> bool:
        outside = (place for place in self.places if not place.in_block and place.is_weight)
        return bool(self.outputs) or any(_fits(place, self.vocabulary) for place in outside)


def _fits(place: Place, sizes: frozenset[int]) -> bool:
    """Whether a matrix has a row for each of the tokens that one of `sizes` counts.

    Where hidden states have that size too, as with a vocabulary of bytes, its name must say so.
    """
    if place.parameter.ndim != 2 or place.is_table:
        return False
    rows, columns = place.sides
    return rows in sizes and (columns not in sizes or place.leaf in OUTPUT_NAMES)


def kinds(module: nn.Module | None) -> set[str]:
    """Return the names of a module's classes: those of libraries that may be missing are known."""
    return {kind.__name__ for kind in type(module).__mro__}  # FSDP2 shards into sub-classes


def attribute(names: tuple[str, ...], module: nn.Module | None) -> int | None:
    """Return the first positive whole number that a module, or its config, gives by a name."""
    sources: tuple[Any, ...] = (module, getattr(module, "config", None))
    for source in sources:
        for name in names:
            value = getattr(source, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None


def _sizes(model: nn.Module, names: tuple[str, ...]) -> frozenset[int]:
    given = (attribute(names, module) for module in model.modules())
    return frozenset(size for size in given if size is not None)


def _answers(model: nn.Module, question: str) -> frozenset[int]:
    """Return the parameters of what the model, and parts of it, return when asked."""
    found: set[int] = set()
    for module in model.modules():
        try:
            answer = getattr(module, question, lambda: None)()
        except (NotImplementedError, AttributeError, TypeError):
            continue  # so do models of transformers that have no such layer
        if isinstance(answer, nn.Module):
            found |= {id(p) for p in answer.parameters()}
        elif isinstance(answer, nn.Parameter):
            found.add(id(answer))
    return frozenset(found)


def _places(model: nn.Module, vocabulary: frozenset[int]) -> Iterator[Place]:
    modules = dict(model.named_modules())
    blocks = tuple(f"{path}." for path in modules if _is_block(path, modules[path], vocabulary))
    for path, module in modules.items():
        parent = modules.get(path.rpartition(".")[0]) if path else None
        inside = f"{path}.".startswith(blocks) or isinstance(parent, nn.MultiheadAttention)
        for name, parameter in module.named_parameters(recurse=False):
            yield Place(path, name, module, parent, parameter, inside)


def _is_block(path: str, module: nn.Module, vocabulary: frozenset[int]) -> bool:
    """Whether a module is a numbered layer of several: not a single matrix, not a whole model."""
    if not path.rpartition(".")[2].isdigit():
        return False
    tables = (m for m in module.modules() if isinstance(m, nn.Embedding))
    whole = any(table.num_embeddings in vocabulary for table in tables)
    return not whole and sum(p.ndim > 1 for p in module.parameters()) > 1
