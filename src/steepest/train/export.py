"""A trained model as a folder that Hugging Face's library `transformers` loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from steepest import files
from steepest.data.tokenizers import Tokenizer
from steepest.errors import UserError
from steepest.models import ModelConfig, hugging_face
from steepest.train import trained

Dtype = Literal["float32", "bfloat16"]


def export(
    checkpoint: Path,
    out: Path,
    *,
    kind: trained.Kind = "evaluation",
    dtype: Dtype = "float32",
) -> trained.Trained:
    """Write a checkpoint, or the newest one of a run's folder, as a model of Hugging Face.

    `out` appears whole or not at all. Returns what was written. Raises UserError as `trained.read`
    and `write` do.
    """
    _require_free(out)
    model = trained.read(checkpoint, kind)
    tokenizer = trained.open_tokenizer(model.config.data)
    write(out, model.config.model, model.weights, tokenizer, dtype)
    return model


def write(
    out: Path,
    config: ModelConfig,
    weights: dict[str, Tensor],
    tokenizer: Tokenizer,
    dtype: Dtype = "float32",
) -> None:
    """Write config.json, model.safetensors, generation_config.json and the tokenizer's files.

    `weights` is the state dict of a model of ours. Raises UserError for a model that no class of
    `transformers` computes, and if `out` holds something or cannot be written.
    """
    _require_free(out)
    about, tensors = hugging_face.convert(config, {k: w.float() for k, w in weights.items()})
    # In config.json a padding token would take its row of the table out of training.
    tokens = {"bos_token_id": None, "eos_token_id": tokenizer.end, "pad_token_id": None}
    generation = {"eos_token_id": tokenizer.end, "pad_token_id": tokenizer.end}
    try:
        with files.new_folder(out) as folder:
            _write_tensors(folder / "model.safetensors", tensors, getattr(torch, dtype))
            tokenizer.save(folder)
            _write_json(folder / "config.json", {**about, **tokens, "torch_dtype": dtype})
            _write_json(folder / "generation_config.json", generation)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror or error}.") from error


def _require_free(out: Path) -> None:
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} exists and is not an empty folder; choose another one.")


def _write_tensors(path: Path, tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import save_file
    except ImportError:
        raise UserError(
            "An export needs the package safetensors; pip install 'steepest[bench]'."
        ) from None
    kept = {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}
    try:
        save_file(kept, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(str(error)) from error
    path.chmod(0o644)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    files.write_text(path, json.dumps(content, indent=2) + "\n")
