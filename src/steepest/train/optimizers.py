"""From an optimizer's name and hyperparameters to the optimizer of a model.

A name is one of the catalogue ("muon"), or a class of one's own, a torch.optim.Optimizer or a
steepest.Rule: "path/to/mine.py:Mine" or "package.module:Mine". A file must stand alone or import
installed packages: only its own content is part of a run's identity.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import sys
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

import steepest
from steepest import models
from steepest.errors import UserError, unknown
from steepest.optim import catalogue
from steepest.train.config import OptimizerConfig
from steepest.train.identity import is_class, is_file

OwnClass = type[Any]
OWN_CLASS = "a class of your own is given as 'path/to/file.py:Class' or 'package.module:Class'"


def build(
    config: OptimizerConfig,
    model: nn.Module,
    *,
    seed: int = 0,
    wrap: Sequence[str] = (),
    nonfinite: Literal["propagate", "skip"] = "propagate",
) -> torch.optim.Optimizer:
    """Return the optimizer of `model` that `config` describes.

    `seed` is that of the random numbers that some rules use; `wrap` names wrappers around those of
    the config; `nonfinite` is what a gradient that is not finite does. Learning rates are
    multiplied by role as a muP model's width asks.

    A class of one's own that takes `weight_decay` gets two parameter groups: tensors of two or more
    dimensions with the decay of `options`, vectors without any. Otherwise it gets all parameters.

    Raises UserError for an unknown name, an unknown hyperparameter, a missing file or class, or a
    class that is neither a torch.optim.Optimizer nor a steepest.Rule.
    """
    options = {key: _tuple(value) for key, value in config.options.items()}
    cls: OwnClass | None = load_class(config.name)[0] if is_class(config.name) else None
    if cls is None or issubclass(cls, steepest.Rule):
        own_rule: Any = cls
        try:
            return steepest.create(
                config.name if own_rule is None else own_rule(),
                _with_multipliers(model, config.lr),
                lr=config.lr,
                seed=seed,
                wrap=[*config.wrap, *wrap],
                nonfinite=nonfinite,
                **options,
            )
        except (TypeError, ValueError) as error:
            raise _failed(config, error) from error
    _check_plain(config, model, wrap, nonfinite)
    names = _check_options(cls, config)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    params: Any = parameters
    if "weight_decay" in names:
        params = [
            {"params": [parameter for parameter in parameters if parameter.ndim >= 2]},
            {
                "params": [parameter for parameter in parameters if parameter.ndim < 2],
                "weight_decay": 0.0,
            },
        ]
    try:
        optimizer: torch.optim.Optimizer = cls(params, lr=config.lr, **options)
    except Exception as error:
        raise _failed(config, error) from error
    if any("lr" not in group for group in optimizer.param_groups):
        raise UserError(
            f"{config.name} has parameter groups without 'lr', where a schedule puts the learning "
            "rate; give it to the defaults of torch.optim.Optimizer.__init__."
        )
    return optimizer


def _with_multipliers(model: nn.Module, lr: float) -> Any:
    """Return the model, or its parameters in groups by role where their learning rates differ."""
    multipliers = models.lr_multipliers(getattr(model, "config", None))
    if not multipliers:
        return model
    found = steepest.roles(model)
    parameters = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    roles = dict.fromkeys(found[name].role for name, _ in parameters)
    return [
        {
            "params": [(name, p) for name, p in parameters if found[name].role is role],
            "role": role,
            **({"lr": lr * multipliers[role.value]} if role.value in multipliers else {}),
        }
        for role in roles
    ]


def _check_plain(
    config: OptimizerConfig, model: nn.Module, wrap: Sequence[str], nonfinite: str
) -> None:
    """Raise UserError for what only an optimizer of steepest can do."""
    if wrappers := [*config.wrap, *wrap]:
        raise UserError(
            f"{config.name} cannot be wrapped in {wrappers[0]!r}: wrappers go around optimizers "
            "of the catalogue and steepest.Rule."
        )
    if nonfinite == "skip":
        raise UserError(
            f"{config.name} cannot skip steps, so training.nonfinite must be propagate; optimizers "
            "of the catalogue and steepest.Rule can."
        )
    if models.lr_multipliers(getattr(model, "config", None)):
        raise UserError(
            f"{config.name} has no roles, so it cannot have the learning rates of model."
            "mup_base_width; use an optimizer of the catalogue or a steepest.Rule."
        )


def check(config: OptimizerConfig, model: models.ModelConfig) -> None:
    """Raise what `build` would raise for a model of this config, without allocating it."""
    if is_class(config.name):  # a constructor of the user's may look at values
        build(config, models.build(models.LlamaConfig(8, 8, 1, heads=1, intermediate_size=8)))
        return
    with torch.device("meta"):
        build(config, models.build(model))


def total_steps_options(name: str) -> frozenset[str]:
    """Return the hyperparameters that are the run's number of steps where they are not given.

    They are those that a rule declares, and `total_steps` of a torch optimizer's constructor.
    Raises UserError as `build` does.
    """
    if not is_class(name):
        return catalogue.recipe(name).rule.total_steps
    cls = load_class(name)[0]
    if issubclass(cls, steepest.Rule):
        return cls.total_steps
    return frozenset({"total_steps"} & set(inspect.signature(cls).parameters))


def source_sha256(name: str) -> str:
    """Return the content hash of the file that defines a class given by path or module.

    Empty for a name of the catalogue. Raises UserError as `build` does.
    """
    return load_class(name)[1] if is_class(name) else ""


def load_class(name: str) -> tuple[OwnClass, str]:
    """Return the class that "file.py:Class" or "module:Class" names, and its file's SHA-256."""
    location, _, class_name = name.rpartition(":")
    if not (location and class_name):
        raise UserError(f"{name!r} names no class; {OWN_CLASS}.")
    module = _load_file(Path(location)) if is_file(location) else _import(location)
    cls = getattr(module, class_name, None)
    if cls is None:
        classes = [key for key, value in vars(module).items() if inspect.isclass(value)]
        raise UserError(f"{location}: {unknown('class', class_name, classes)}")
    if not (inspect.isclass(cls) and issubclass(cls, (torch.optim.Optimizer, steepest.Rule))):
        raise UserError(
            f"{name} is not a class derived from torch.optim.Optimizer or steepest.Rule."
        )
    file = inspect.getsourcefile(sys.modules[cls.__module__])
    if file is None or not Path(file).is_file():
        raise UserError(f"{name} has no source file, so its runs cannot be told apart.")
    return cls, hashlib.sha256(Path(file).read_bytes()).hexdigest()


def _load_file(path: Path) -> types.ModuleType:
    """Execute a file as a module, once per content; the module can be found for pickling."""
    try:
        source = path.read_bytes()
    except OSError as error:
        raise UserError(f"Cannot read the optimizer file {path}: {error.strerror}.") from None
    digest = hashlib.sha256(str(path.resolve()).encode() + b"\0" + source).hexdigest()[:16]
    name = f"steepest_custom_{path.stem}_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    module = types.ModuleType(name)
    module.__file__ = str(path.resolve())
    sys.modules[name] = module
    try:
        exec(compile(source, path, "exec"), vars(module))
    except Exception as error:
        del sys.modules[name]
        raise UserError(
            f"Loading the optimizer file {path} failed with {type(error).__name__}: {error}."
        ) from error
    return module


def _import(name: str) -> types.ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:  # whatever the module raises
        raise UserError(f"Cannot import {name!r}: {error}; {OWN_CLASS}.") from None


def _check_options(cls: OwnClass, config: OptimizerConfig) -> set[str]:
    """Raise UserError unless the constructor takes lr and every option; return its names."""
    signature = inspect.signature(cls).parameters
    parameters = [
        parameter
        for parameter in list(signature.values())[1:]  # the first is the parameters to optimize
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    ]
    names = {parameter.name for parameter in parameters}
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.values()):
        return names
    for name in ("lr", *config.options):
        if name not in names:
            raise UserError(
                f"{config.name}: {unknown('hyperparameter', name, names)} "
                f"(its constructor takes {', '.join(sorted(names)) or 'none'})"
            )
    return names


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _failed(config: OptimizerConfig, error: Exception) -> UserError:
    if isinstance(error, UserError):
        return error
    return UserError(f"The optimizer {config.name!r} cannot be built: {error}")


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes of the optimizer's state, step counters and other 0-d tensors aside."""
    own = getattr(optimizer, "state_bytes", None)
    return int(own()) if callable(own) else _tensor_bytes(list(optimizer.state.values()))


def skipped_steps(optimizer: torch.optim.Optimizer) -> int:
    """Return how many steps an optimizer of steepest left out for want of finite gradients."""
    return optimizer.skipped_steps if isinstance(optimizer, steepest.Optimizer) else 0


def _tensor_bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size() if value.ndim else 0
    if isinstance(value, Mapping):
        return sum(_tensor_bytes(item) for item in value.values())
    if isinstance(value, (list, tuple)):
        return sum(_tensor_bytes(item) for item in value)
    return 0


def learning_rates(
    optimizer: torch.optim.Optimizer, roles: Mapping[nn.Parameter, str]
) -> dict[str, float]:
    """Return the learning rates of the coming step, by the role of the parameters they are for."""
    return {
        roles[p]: float(group["lr"]) for group in optimizer.param_groups for p in group["params"]
    }
