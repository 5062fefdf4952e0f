"""What an operator must say of itself: one class for each kind of operator."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from regrow.compaction.edit import Edit
from regrow.compaction.flow import Flow, Followed, Value, fill
from regrow.compaction.plan import Plan
from regrow.compaction.units import FREE


class Rule:
    """What one kind of operator does; this one does anything, with all that it is given."""

    def forward(self, flow: Flow, node: fx.Node, out: Tensor) -> Value:
        """What is known of the result `out` of a node."""
        flow.pin_inputs(node)
        return Value(out, fill(out, False), fill(out, FREE))

    def backward(self, flow: Flow, node: fx.Node, needed: Tensor) -> None:
        """Mark what of its inputs a node uses, where `needed` of its own elements are."""
        flow.use_inputs(node)

    def follow(self, flow: Flow, node: fx.Node) -> list[Followed] | None:
        """Which parameters move along when elements change places, None where that is not known.

        What may go and may not change places is pinned, or tied to what it must go with.
        """
        return None

    def constrain(self, plan: Plan, node: fx.Node) -> None:
        """Take back what cannot go because of this node."""

    def rewrite(self, edit: Edit, node: fx.Node) -> None:
        """Make the node one of the elements that stay."""

    def origin(self, flow: Flow, node: fx.Node) -> tuple[fx.Node, int] | None:
        """The weight whose outputs begin here, and the axis along which they lie; None where none do."""
        return None


class Rules(NamedTuple):
    """The rule of each operator."""

    by_packet: Mapping[Any, Rule]
    pointwise: Rule
    """Of operators that torch says are pointwise."""
    default: Rule

    def of(self, node: fx.Node) -> Rule:
        """The rule of a call."""
        packet = getattr(node.target, "overloadpacket", None)
        if node.target is torch.ops.aten.view.dtype:  # no view of elements, but of their bytes
            return self.default
        if packet in self.by_packet:
            return self.by_packet[packet]
        tags = getattr(node.target, "tags", ())
        draws = torch.Tag.nondeterministic_seeded in tags
        return self.pointwise if torch.Tag.pointwise in tags and not draws else self.default
