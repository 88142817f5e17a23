"""One step of some parameters: which values it sees, and what parameters share before it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from steepest.optim import stepping
from steepest.optim.buckets import Bucket, Inputs
from steepest.optim.live import Layout
from steepest.optim.pieces import Sharding, added_up
from steepest.optim.stepping import Phase
from steepest.optim.wrapper import overrides

if TYPE_CHECKING:
    from steepest.optim.plan import Plan


@dataclass
class Turn:
    """Pieces of one bucket that take the same step."""

    plan: Plan
    part: Bucket
    """The pieces: a bucket of the plan, or part of one."""
    step: int
    memory: dict[str, Any]
    inputs: Inputs | None = None
    """What the step reads, once gathered."""

    @property
    def device(self) -> torch.device:
        """Where the pieces are."""
        return self.part.pieces[0].param.device

    def values(self) -> dict[str, Any]:
        """Return hyperparameters, memory and scalars of this step by name."""
        return self.plan.values_at(self.step, self.memory)

    @property
    def measuring(self) -> bool:
        """Whether the rule measures before this step."""
        rule = self.plan.rule
        return bool(rule.shared()) and rule.measures(self.step)

    @property
    def starting(self) -> bool:
        """Whether this is a first step that only sets state up."""
        return self.step == 1 and self.plan.rule.starts()

    def run(
        self, phase: Phase, values: Tensor, layout: Layout | None = None
    ) -> dict[str, Tensor] | None:
        """Run a phase on the gathered inputs. `values` are live values, laid out as the plan's."""
        if self.inputs is None:
            self.inputs = self.part.gather(params=self.plan.rule.reads_param)
        plan = self.plan
        own = self.part.source is None  # Copies are of any number of pieces.
        kernel = stepping.kernel(
            plan.shared_rule,
            layout or plan.layout,
            plan.runs,
            self.part,
            phase=phase,
            compile=plan.compiled and own and phase in self._every_step(),
        )
        return kernel(self.inputs, values)

    def _every_step(self) -> tuple[Phase, ...]:
        """Return the phases that every step has, which are worth compiling."""
        rare = overrides(self.plan.rule, "measures")
        return ("update",) if rare else ("update", "measure")

    def finish(self) -> None:
        """Bring everything that was copied back to where it belongs."""
        assert self.inputs is not None
        self.part.scatter(self.inputs)
        if self.plan.rule.keeps_gradient:
            self.part.scatter_grads(self.inputs)
        self.keep_state()

    def keep_state(self) -> None:
        """Bring back the state alone."""
        self.part.give_back()
        self.inputs = None


class Values:
    """The live values of turns on their devices, each sent once."""

    def __init__(self, shared: Callable[[Plan], dict[str, Tensor]]) -> None:
        self._shared = shared
        self._sent: dict[Any, Tensor] = {}

    def of(self, turn: Turn) -> Tensor:
        """Return a turn's values in its plan's layout, shared ones at the end."""
        key = (id(turn.plan), turn.step, tuple(turn.memory.items()), turn.device)
        if key not in self._sent:
            plan = turn.plan
            now = turn.values()
            vector = to_device(Layout.of(now).pack(now, plan.runs), turn.device)
            if shared := self._shared(plan):
                rest = torch.stack([to_device(value, turn.device) for value in shared.values()])
                vector = torch.cat([vector, rest])
            self._sent[key] = vector
        return self._sent[key]


def combine(turns: Sequence[Turn], values: Values) -> dict[str, Tensor]:
    """Return the new shared values of a rule from what is measured of all that step."""
    parts: dict[str, dict[Sharding | None, Tensor]] = {}
    pooled: dict[str, list[Tensor]] = {}
    first = turns[0]
    for turn in turns:
        part = turn.run("measure", values.of(turn))
        assert part is not None
        sharding = turn.part.pieces[0].sharding
        for name, value in part.items():
            if not stepping.is_sum(value, turn.plan.runs):
                pooled.setdefault(name, []).append(value.to(first.device))
                continue
            known, own = parts.setdefault(name, {}), value.double().to(first.device)
            known[sharding] = known[sharding] + own if sharding in known else own
    sums = {name: added_up(part) for name, part in parts.items()}
    sums |= {name: torch.cat(values, -1) for name, values in pooled.items()}
    plan = first.plan

    def combined(sums: dict[str, Tensor], values: Tensor) -> dict[str, Tensor]:
        return plan.shared_rule.combine(sums, plan.layout.unpack(values))

    if plan.runs is None:
        return combined(sums, values.of(first))
    per_run: dict[str, Tensor] = torch.vmap(combined, in_dims=(0, 1))(sums, values.of(first))
    return per_run


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Return live values on a device."""
    # Apple GPUs have no float64: there 1 - beta keeps fewer digits.
    dtype = torch.float32 if device.type == "mps" else values.dtype
    return values.to(device, dtype, non_blocking=True)
