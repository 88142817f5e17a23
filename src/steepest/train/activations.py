"""What the forward and backward pass of a part of a batch hold in memory, counted without either.

The model runs on fake tensors, which have shapes and storages but no content, and every storage is
counted from its making to its end. So the count follows the code of any architecture, in any
precision and with recomputed activations, and takes a moment for a model of any size.
"""

from __future__ import annotations

import copy
import dataclasses
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from steepest import models
from steepest.models.cross_entropy import CHUNK_TOKENS
from steepest.train import precision
from steepest.train.config import RunConfig

COUNTED_LAYERS = (2, 4)
"""Deeper models are counted with so many layers; each further layer takes as much as these do."""
LOSS_BYTES = 16
"""Of a logit of the chunk that the loss is at: four tensors in float32."""


def activation_bytes(config: RunConfig, device_type: str = "cpu") -> int:
    """Return the most that forward and backward pass of one part of a batch hold at a time.

    Weights, buffers and gradients of weights are not in it; what is kept for the backward pass and
    what operations hold in between is. A part is data.batch_size rows over
    training.gradient_accumulation. Operations are PyTorch's on a CPU, not compiled; on a GPU
    ("cuda") the logits of more tokens exist at a time, and fused kernels may hold less.
    """
    numbers = precision.on(torch.device(device_type), config.training.precision)
    training = dataclasses.replace(config.training, precision=numbers)
    config = dataclasses.replace(config, training=training)
    few, more = COUNTED_LAYERS
    layers = config.model.layers
    if layers <= more:
        counted = _counted(config, layers)
    else:
        least, most = _counted(config, few), _counted(config, more)
        counted = most + (layers - more) * (most - least) // (more - few)
    rows = config.data.batch_size // config.training.gradient_accumulation
    tokens = rows * config.data.sequence_length
    chunk, here = (min(tokens, CHUNK_TOKENS[name]) for name in (device_type, "cpu"))
    return counted + LOSS_BYTES * config.model.vocab_size * (chunk - here)


def _counted(config: RunConfig, layers: int) -> int:
    with torch.device("meta"):
        real = models.build(dataclasses.replace(config.model, layers=layers))
    real.to(precision.weight_dtype(config.training.precision))
    rows = config.data.batch_size // config.training.gradient_accumulation
    shape = (rows, config.data.sequence_length)
    with FakeTensorMode():
        model = _on_cpu(real).train()
        model.recompute_activations = config.training.recompute_activations
        tokens = torch.zeros(shape, dtype=torch.int64)
        packed = config.data.packing == "documents"
        documents = torch.zeros(shape, dtype=torch.int32) if packed else None
        live = _Live()
        for p in model.parameters():
            p.register_post_accumulate_grad_hook(live.ignore_gradient)  # type: ignore[no-untyped-call]
        with live:
            with precision.autocast(config.training.precision, torch.device("cpu")):
                loss = model.objective(tokens, tokens, documents, z_loss=config.training.z_loss)
            loss.objective.backward()  # type: ignore[no-untyped-call]
    return live.peak


def _on_cpu(model: models.LanguageModel) -> models.LanguageModel:
    """Return a copy of a model of the meta device with fake parameters and buffers on the CPU."""
    twins: dict[int, Any] = {id(t): torch.empty(t.shape, dtype=t.dtype) for t in model.buffers()}
    for p in model.parameters():
        twins[id(p)] = nn.Parameter(torch.empty(p.shape, dtype=p.dtype))
    return copy.deepcopy(model, twins)


class _Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the storages that operations make, while they live."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now, self.peak = 0, 0
        self._ends: weakref.WeakKeyDictionary[Any, weakref.finalize[..., Any]] = (
            weakref.WeakKeyDictionary()
        )

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[Any],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return made

    def _count(self, storage: Any) -> None:
        if storage not in self._ends:
            self._ends[storage] = weakref.finalize(storage, self._free, storage.nbytes())
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)

    def _free(self, size: int) -> None:
        self.now -= size

    def ignore_gradient(self, parameter: Tensor) -> None:
        """Count the gradient that a parameter has got no longer."""
        assert parameter.grad is not None
        if (end := self._ends.get(parameter.grad.untyped_storage())) is not None:
            end()
