"""What there is to know about optimizers, as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from steepest import analysis
from steepest.analysis.memory import GB
from steepest.optim import catalogue
from steepest.optim.fidelity import fidelity
from steepest.optim.memory import Held
from steepest.optim.presets import Preset, presets
from steepest.report import formatting


def listing() -> Table:
    """Return every optimizer with its family, year, state and what it needs, a line each."""
    table = Table(box=None)
    table.add_column("name", no_wrap=True)
    for title in ("year", "family", "state B/parameter", "steps", "needs"):
        table.add_column(title)
    for name in catalogue.names():
        about = catalogue.describe(name)
        table.add_row(
            name,
            str(about.year),
            about.family,
            f"{about.state_bytes_per_parameter:.3g}",
            ", ".join(about.roles) if len(about.roles) < 4 else "all",
            "; ".join(hook.partition(":")[0] for hook in about.hooks),
        )
    return table


def detail(name: str) -> Iterator[RenderableType]:
    """Yield what there is to know about one optimizer, or one wrapper."""
    if name in catalogue.WRAPPERS:
        yield from _wrapper(name)
        return
    about = catalogue.describe(name)
    heading = Text.assemble((about.name, "bold"), f"  {about.family}, {about.year}. {about.paper}")
    yield heading
    yield Text(f"\n{about.formula}\n")
    yield Text(f"Steps the roles: {', '.join(about.roles)}.")
    for hook in about.hooks:
        yield Text(f"Needs {hook}.")
    state = ", ".join(f"{key} {shape}" for key, shape in about.state.items()) or "none"
    yield Text(
        f"State of a 256 x 128 matrix: {state}; {about.state_bytes} bytes for m x n in float32.\n"
    )
    yield _hyperparameters(about.hyperparameters)
    for sentence in about.differs:
        yield Text(f"\nDiffers: {sentence}")
    yield from _compared(name)
    yield from _tuned(presets(name))


def _wrapper(name: str) -> Iterator[RenderableType]:
    about = catalogue.describe_wrapper(name)
    yield Text.assemble((about.name, "bold"), f"  a wrapper: create(..., wrap=[{name!r}])")
    yield Text(f"\n{about.formula}\n")
    whose = "of all roles" if about.everywhere else "of the method's own roles"
    yield Text(f"Goes around the rules {whose}.\n")
    if about.hyperparameters:
        yield _hyperparameters(about.hyperparameters)
    yield from _compared(name)


def _hyperparameters(of: Mapping[str, tuple[object, str]]) -> Table:
    table = Table("hyperparameter", "default", "meaning", box=None)
    for key, (value, meaning) in of.items():
        table.add_row(key, str(value), meaning)
    return table


def _compared(name: str) -> Iterator[RenderableType]:
    measured = fidelity(name)
    if not measured:
        return
    table = Table("compared with, over 32 steps", "largest error", "", box=None)
    for key in dict.fromkeys((c.package, c.comparison.partition(",")[0]) for c in measured):
        package, precision = key
        alike = [c for c in measured if (c.package, c.comparison.partition(",")[0]) == key]
        worst = max(alike, key=lambda c: c.error)
        what = package or "the paper in float64 NumPy"
        table.add_row(f"{what} ({precision})", f"{worst.error:.1e}", worst.note)
    yield Text()
    yield table


def _tuned(found: dict[str, Preset]) -> Iterator[RenderableType]:
    if not found:
        return
    table = Table("preset", "hyperparameters", "tuned for", box=None)
    for preset in found.values():
        values = ", ".join(f"{key}={value}" for key, value in preset.hyperparameters.items())
        wrapped = f"wrap={list(preset.wrap)}, " if preset.wrap else ""
        table.add_row(preset.name, wrapped + values, preset.setting.partition(":")[0])
    yield Text()
    yield table


def memory_by_role(rows: Sequence[Held]) -> Table:
    """Return the memory of one optimizer, role by role."""
    table = Table("role", "parameters", "weights GB", "gradients GB", "state GB", box=None)
    parts_of: list[tuple[str, Held | analysis.Memory]] = [(row.role, row) for row in rows]
    for role, part in [*parts_of, ("all", analysis.memory(rows))]:
        parts = (part.parameter_bytes, part.gradient_bytes, part.state_bytes)
        sizes = (f"{size / GB:.4f}" for size in parts)
        table.add_row(role, formatting.count(part.parameters), *sizes)
    return table


def memory_by_optimizer(rows: Iterable[tuple[str, Sequence[Held]]]) -> Table:
    """Return the memory of several optimizers, a line each."""
    table = Table(
        "optimizer", "state GB", "state B/parameter", "weights + state GB", "all GB", box=None
    )
    for name, held in rows:
        total = analysis.memory(held)
        table.add_row(
            name,
            f"{total.state_bytes / GB:.4f}",
            f"{total.state_bytes_per_parameter:.3g}",
            f"{total.model_and_state_gb:.4f}",
            f"{total.total_bytes / GB:.4f}",
        )
    return table
