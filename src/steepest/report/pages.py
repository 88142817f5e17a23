"""The generated pages of the documentation: every optimizer, its fidelity, its memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined

from steepest import analysis, models
from steepest.analysis.memory import GB
from steepest.optim import catalogue
from steepest.optim.fidelity import Comparison, fidelity
from steepest.optim.memory import held
from steepest.optim.presets import presets

PRECISIONS = ("float64", "float32", "bfloat16")
SIZES = ("llama-60m", "llama-130m", "llama-350m", "llama-1b", "llama-7b")


def all_pages() -> dict[str, str]:
    """Return the text of each page by its file name."""
    return {
        "optimizers.md": optimizers_page(),
        "fidelity.md": fidelity_page(),
        "memory.md": memory_page(),
    }


def table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def optimizers_page() -> str:
    """Return the page of all optimizers: a table, then each in detail."""
    described = [catalogue.describe(name) for name in catalogue.names()]
    overview = table(
        ("name", "year", "family", "state", "steps", "needs"),
        (
            (
                f"[{d.name}](#{d.name})",
                str(d.year),
                d.family,
                f"`{d.state_bytes}`",
                ", ".join(d.roles) if len(d.roles) < 4 else "all",
                "; ".join(hook.partition(":")[0] for hook in d.hooks),
            )
            for d in described
        ),
    )
    wrappers = [catalogue.describe_wrapper(name) for name in catalogue.WRAPPERS]
    return _page(
        "optimizers",
        overview=overview,
        sections="\n".join(map(_section, described)),
        wrappers="\n".join(map(_wrapper, wrappers)),
    )


def _page(name: str, **parts: str) -> str:
    environment = Environment(
        loader=PackageLoader("steepest.report"),
        undefined=StrictUndefined,
        autoescape=False,
    )
    return environment.get_template(f"{name}.md").render(parts) + "\n"


def _section(d: catalogue.Description) -> str:
    text = f"## {d.name}\n\n{d.family}, {d.year}. {d.paper}\n\n```\n{d.formula}\n```\n\n"
    text += _hyperparameters(d.hyperparameters)
    if d.hooks:
        text += "\nNeeds " + "; ".join(d.hooks) + ".\n"
    if d.differs:
        text += "\nPublic implementations that differ:\n\n"
        text += "".join(f"- {sentence}\n" for sentence in d.differs)
    if found := presets(d.name):
        text += "\nPresets: " + ", ".join(f"`{name}`" for name in found) + ".\n"
    return text


def _wrapper(d: catalogue.WrapperDescription) -> str:
    text = f"### {d.name}\n\n```\n{d.formula}\n```\n\n"
    text += "Goes around the rules of all roles.\n\n" if d.everywhere else ""
    text += _hyperparameters(d.hyperparameters) if d.hyperparameters else ""
    return text.rstrip() + "\n"


def _hyperparameters(of: Mapping[str, tuple[object, str]]) -> str:
    rows = ((f"`{key}`", f"`{value}`", meaning) for key, (value, meaning) in of.items())
    return table(("hyperparameter", "default", "meaning"), rows)


def fidelity_page() -> str:
    """Return the page of measured errors."""
    names = (*catalogue.names(), *catalogue.WRAPPERS)
    rows = [row for name in names for row in _fidelity_rows(name)]
    titles = ("optimizer", "compared with", *PRECISIONS, "conventions, reasons")
    differing = "".join(
        f"- **{name}**: {sentence}\n"
        for name in catalogue.names()
        for sentence in catalogue.describe(name).differs
    )
    return _page("fidelity", rows=table(titles, rows), differing=differing)


def _fidelity_rows(name: str) -> list[tuple[str, ...]]:
    measured = fidelity(name)
    rows = []
    for package in dict.fromkeys(c.package for c in measured):
        mine = [c for c in measured if c.package == package]
        notes = dict.fromkeys(c.note for c in mine if c.note)
        errors = [_worst(mine, precision) for precision in PRECISIONS]
        rows.append((name, package or "the paper, float64 NumPy", *errors, "; ".join(notes)))
    return rows


def _worst(measured: Iterable[Comparison], precision: str) -> str:
    errors = [c.error for c in measured if c.comparison.startswith(precision)]
    if not errors:
        return ""
    return f"{max(errors):.0e}" if max(errors) > 0 else "rounding"


def memory_page() -> str:
    """Return the page of memory: weights and state of every optimizer at five sizes."""
    return _page(
        "memory",
        float32=_memory_table(torch.float32, None),
        bfloat16=_memory_table(torch.bfloat16, torch.bfloat16),
    )


def _memory_table(dtype: torch.dtype, state_dtype: torch.dtype | None) -> str:
    rows = []
    for name in catalogue.names():
        cells = [_gigabytes(name, size, dtype, state_dtype) for size in SIZES]
        rows.append((name, *cells))
    return table(("optimizer", *SIZES), rows)


def _gigabytes(name: str, size: str, dtype: torch.dtype, state_dtype: torch.dtype | None) -> str:
    with torch.device("meta"):
        model = models.build(models.size(size))
    total = analysis.memory(held(name, model, dtype=dtype, state_dtype=state_dtype))
    return f"{(total.parameter_bytes + total.state_bytes) / GB:.2f}"
