"""What goes: all that is dead, less what cannot go."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, fx

from regrow.compaction.flow import Flow, Value, any_but, fill, name_of
from regrow.compaction.units import distinct, lean


class Plan:
    """The largest set of dead units without which every tensor is still a box, and no output changes.

    Args:
        flow: what is known.
        constrain: takes back what cannot go because of one node.
    """

    def __init__(self, flow: Flow, constrain: Callable[[Plan, fx.Node], None]) -> None:
        self.flow = flow
        self.units = flow.units
        stays = flow.units.stays()
        for node, value in self._all():
            label, dead = distinct(value.label, self.dead(node, value))
            stays[flow.units.find(label[~dead])] = True
        self.gone = ~stays & (flow.units.parent == torch.arange(len(stays)))
        self.changed = True
        while self.changed:
            self.changed = False
            for node, value in self._all():
                self._box(node, value)
            for node in flow.values:
                if node.op == "call_function":
                    constrain(self, node)

    def _all(self) -> Iterator[tuple[fx.Node, Value]]:
        yield from self.flow.values.items()
        yield from ((mover, value) for (mover, _), value in self.flow.entries.items())

    def dead(self, node: fx.Node, value: Value) -> Tensor:
        """Which elements are constant or unused."""
        if self.flow.values.get(node) is not value:
            return value.known
        used = self.flow.used.get(node, fill(value.tensor, False))
        return lean(lambda known, used: known | ~used, value.known, used)

    def kept(self, value: Value) -> Tensor:
        """Which elements of a tensor stay."""
        return lean(lambda label: ~self.gone[self.units.find(label)], value.label)

    def axis(self, node: fx.Node, axis: int) -> Tensor:
        """(size,) which indices along an axis of a node stay."""
        return any_but(self.kept(self.flow.values[node]), axis)

    def restore(self, labels: Tensor, why: str) -> None:
        """Let units stay after all."""
        roots = self.units.find(labels)
        lost = self.gone[roots]
        if lost.any():
            self.units.pin(labels[lost], why)
            self.gone[roots] = False
            self.changed = True

    def _box(self, node: fx.Node, value: Value) -> None:
        (label,) = distinct(value.label)
        kept = ~self.gone[self.units.find(label)]
        if kept.numel() and not kept.any():
            self.restore(label.reshape(-1)[:1], f"{name_of(node)} would have nothing left")
            kept = ~self.gone[self.units.find(label)]
        box = torch.ones((), dtype=torch.bool)
        for axis in range(kept.dim()):
            shape = [1] * kept.dim()
            shape[axis] = -1
            box = box & any_but(kept, axis).view(shape)
        uneven = box & ~kept
        if uneven.any():
            self.restore(label[uneven], f"{name_of(node)} would be uneven without it")
