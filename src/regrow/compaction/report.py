"""What compaction did, and what it could not."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import fx

from regrow.compaction.flow import all_but, along
from regrow.compaction.plan import Plan
from regrow.core.text import by, table

Shapes = Mapping[str, tuple[int, ...]]


class Kept(NamedTuple):
    """Dead outputs of one weight that had to stay."""

    name: str
    """The weight."""
    dead: int
    """How many of its outputs are constant or unused, and stay for this reason."""
    outputs: int
    """How many outputs it has."""
    reason: str
    """Why they stay."""


@dataclass(frozen=True)
class Report:
    """Sizes before and after, and what is dead and stays.

    `str` of it is a table.
    """

    before: Shapes
    """The shape of each parameter of the model."""
    after: Shapes
    """The shape of each parameter of the compacted one."""
    kept: tuple[Kept, ...]

    @property
    def parameters(self) -> tuple[int, int]:
        """Entries of all parameters before and after."""
        before, after = (sum(map(math.prod, shapes.values())) for shapes in (self.before, self.after))
        return before, after

    def __str__(self) -> str:
        rows = [
            [name, _text(self.before.get(name)), _text(self.after.get(name))]
            for name in dict.fromkeys([*self.before, *self.after])
            if self.before.get(name) != self.after.get(name)
        ]
        before, after = self.parameters
        lines = [table(["parameter", "before", "after"], [*rows, ["entries", f"{before:,}", f"{after:,}"]])]
        lines += [f"{k.name}: {k.dead:,} of {k.outputs:,} outputs are dead and stay: {k.reason}" for k in self.kept]
        return "\n".join(lines)


def _text(shape: tuple[int, ...] | None) -> str:
    return "none" if shape is None else by(shape)


def kept(plan: Plan, origin_of: Callable[[fx.Node], tuple[fx.Node, int] | None]) -> tuple[Kept, ...]:
    """What is dead in a graph from which nothing more can go, weight by weight."""
    flow, said, found = plan.flow, plan.units.reasons(), []
    for node in flow.values:
        origin = origin_of(node) if node.op == "call_function" else None
        if origin is None:
            continue
        weight, axis = origin
        value = flow.values[node]
        dead = all_but(plan.dead(node, value), axis)
        roots = plan.units.find(along(value.label, axis))[dead]
        name = str(weight.target) if weight.op == "get_attr" else weight.name
        reasons = [said[r] or "it goes with others that live" for r in roots.tolist()]
        found += [Kept(name, reasons.count(r), len(dead), r) for r in dict.fromkeys(reasons)]
    return tuple(found)


def shapes(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """The shape of each parameter; a shared one once."""
    return {name: tuple(p.shape) for name, p in module.named_parameters()}
