"""A recipe: what a name of the catalogue means."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from steepest.optim.roles import NamedRole, Role
from steepest.optim.rule import Rule

HIDDEN = frozenset({Role.HIDDEN})
MATRICES = frozenset({Role.HIDDEN, Role.EMBEDDING, Role.HEAD})


@dataclass(frozen=True)
class Part:
    """A rule for some roles beside the recipe's main one.

    Its hyperparameters have `prefix` and an underscore before their names. Those that it `follows`,
    all of them or some by name, take the main rule's value unless they are given under that name.
    """

    prefix: str
    roles: frozenset[Role]
    rule: Rule
    follows: bool | frozenset[str] = False

    def hyperparameters(self, main: Rule) -> dict[str, Any]:
        """Return the hyperparameters that are the part's own, under their prefixed names."""
        mine, theirs = self.rule.hyperparameters(), main.hyperparameters()
        return {
            f"{self.prefix}_{name}": value
            for name, value in mine.items()
            if not self._follows(name) or name not in theirs or value != theirs[name]
        }

    def given(self, main: Rule, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return what `values` (of `create`) say of this part's hyperparameters."""
        found = {}
        for name in self.rule.hyperparameters():
            if (own := f"{self.prefix}_{name}") in values:
                found[name] = values[own]
            elif self._follows(name) and name in values and own not in self.hyperparameters(main):
                found[name] = values[name]
        return found

    def _follows(self, name: str) -> bool:
        return self.follows if isinstance(self.follows, bool) else name in self.follows


@dataclass(frozen=True)
class Recipe:
    """What a name of the catalogue means.

    Each of `parts` steps its roles, and `rule` all others. The AdamW that steps what a method is
    not meant for is a part with the prefix `adam`.
    """

    name: str
    rule: Rule
    family: str
    year: int
    paper: str
    """Who and where: authors and arXiv id or address."""
    state: str
    """Bytes of state of a float32 matrix of `m` rows and `n` columns that `rule` steps, as a Python
    expression of m, n and the rule's hyperparameters (with min, max, abs)."""
    parts: tuple[Part, ...] = ()
    differs: tuple[str, ...] = ()
    """Public implementations under this name that do something else, a sentence each."""
    adapt: Callable[[NamedRole, Tensor], Mapping[str, Any]] | None = None
    """Returns hyperparameters of `rule` that depend on what a parameter is."""

    def hyperparameters(self) -> dict[str, Any]:
        """Return every hyperparameter that `create` takes, with its default."""
        found = self.rule.hyperparameters()
        for part in self.parts:
            found |= part.hyperparameters(self.rule)
        return found

    def part_of(self, role: Role | None) -> Part | None:
        """Return the part that steps a role, None where the main rule does."""
        return next((part for part in self.parts if role in part.roles), None)

    @property
    def routed(self) -> bool:
        """Whether roles are treated differently."""
        return bool(self.parts)
