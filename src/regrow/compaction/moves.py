"""Rules of operators that move elements and compute nothing: views, slices, concatenation, padding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from regrow.compaction.edit import Edit, argument
from regrow.compaction.flow import Flow, Followed, Value, any_but, anywhere, everywhere, fill, name_of, spread, varies
from regrow.compaction.plan import Plan
from regrow.compaction.rule import Rule

aten = torch.ops.aten


class Move(Rule):
    """Elements take what is known of them along."""

    def forward(self, flow: Flow, node: fx.Node, out: Tensor) -> Value:
        """Parameters among the operands become units of their own, element by element."""
        inputs = {n: flow.values[n] for n in flow.sources(node)}
        for leaf in flow.leaves.intersection(node.all_input_nodes):
            tensor = flow.raw[leaf]
            if isinstance(tensor, Tensor):
                label = flow.units.fresh(tensor.numel()).view(tensor.shape)
                inputs[leaf] = flow.entries[node, leaf] = Value(tensor, fill(tensor, True), label)
                if not tensor.is_floating_point():
                    flow.units.pin(label, "it is no number")
        known = self._apply(flow, node, {n: v.known for n, v in inputs.items()})
        return Value(out, known, self._apply(flow, node, {n: v.label for n, v in inputs.items()}))

    def backward(self, flow: Flow, node: fx.Node, needed: Tensor) -> None:
        """Wherever they went."""
        places, end = {}, 0
        for source in node.all_input_nodes:
            if isinstance(tensor := flow.raw[source], Tensor):
                places[source] = torch.arange(end, end + tensor.numel()).view(tensor.shape)
                end += tensor.numel()
        used = torch.zeros(end, dtype=torch.bool)
        used[self._apply(flow, node, places)[needed]] = True
        for source, at in places.items():
            flow.use(source, used[at])

    @staticmethod
    def _apply(flow: Flow, node: fx.Node, tensors: dict[fx.Node, Tensor]) -> Tensor:
        def load(n: fx.Node) -> Any:
            return tensors.get(n, flow.raw[n])

        # A view of what is broadcast need not exist.
        packet = getattr(node.target, "overloadpacket", None)
        target: Any = aten.reshape if packet in (aten.view, aten._unsafe_view) else node.target
        moved: Tensor = target(*fx.map_arg(node.args, load), **fx.map_arg(node.kwargs, load))
        return moved

    def follow(self, flow: Flow, node: fx.Node) -> list[Followed]:
        """Parameters that are moved, as their own elements."""
        leaves = [leaf for leaf in flow.parameters(node) if (node, leaf) in flow.entries]
        return [f for leaf in leaves for f in flow.along_one(leaf, flow.entries[node, leaf].label, name_of(node))]

    def rewrite(self, edit: Edit, node: fx.Node) -> None:
        """Parameters lose the elements that go."""
        for leaf in edit.leaves(node):
            kept = edit.plan.kept(edit.flow.entries[node, leaf])
            cuts = {a: any_but(kept, a) for a in range(kept.dim())}
            node.replace_input_with(leaf, edit.cut(leaf, cuts))


class Squeeze(Move):
    """Axes of size 1 go; one that is larger stays, so it must not become 1."""

    def constrain(self, plan: Plan, node: fx.Node) -> None:
        """Two indices of an axis stay where it had more than one."""
        value = plan.flow.values.get(node.args[0])
        for axis, size in enumerate(value.tensor.shape if value is not None else ()):
            if value is not None and size > 1 and int(plan.axis(argument(node, 0), axis).sum()) == 1:
                plan.restore(value.label, "a squeeze would take its axis away")


class Resize(Move):
    """One whose second argument is the size of the result."""

    def rewrite(self, edit: Edit, node: fx.Node) -> None:
        """Sizes follow what stays; one that may vary, in proportion."""
        super().rewrite(edit, node)
        sizes = node.args[1]
        assert isinstance(sizes, list | tuple)
        shape, changed = edit.flow.values[node].tensor.shape, []
        first = len(shape) - len(sizes)
        for axis, size in enumerate(sizes, first):
            old, new = shape[axis], int(edit.axis(node, axis).sum())
            if old == new or size == -1:
                changed.append(size)
            elif isinstance(size, fx.Node):
                changed.append(edit.scaled(node, size, new, old))
            else:
                changed.append(new)
        node.update_arg(1, changed)


class Slice(Move):
    """A range of indices of one axis."""

    def constrain(self, plan: Plan, node: fx.Node) -> None:
        """Only a range of consecutive indices, given as numbers, can shift."""
        axis, bounds, step = self._read(node)
        value = plan.flow.values.get(node.args[0])
        if value is not None and (step != 1 or not all(isinstance(b, int) for b in bounds)):
            gone = ~plan.axis(argument(node, 0), axis)
            if gone.any():
                plan.restore(value.label, "a slice of it has bounds that vary")

    def rewrite(self, edit: Edit, node: fx.Node) -> None:
        """Bounds count what stays before them."""
        super().rewrite(edit, node)
        axis, bounds, _ = self._read(node)
        if node.args[0] in edit.flow.values and not edit.axis(node.args[0], axis).all():
            kept = edit.axis(node.args[0], axis)
            low, high = (int(kept[: int(b)].sum()) for b in bounds)
            node.args = (node.args[0], axis, low, high)

    @staticmethod
    def _read(node: fx.Node) -> tuple[int, list[Any], Any]:
        axis, low, high, step = (argument(node, i) for i in range(1, 5))
        return axis or 0, [0 if low is None else low, torch.iinfo(torch.int64).max if high is None else high], step or 1


class Select(Move):
    """One index of an axis."""

    def constrain(self, plan: Plan, node: fx.Node) -> None:
        """Only a number can shift."""
        if not isinstance(node.args[2], int) and node.args[0] in plan.flow.values:
            plan.restore(plan.flow.values[node.args[0]].label, "an index of it varies")

    def rewrite(self, edit: Edit, node: fx.Node) -> None:
        """It counts what stays before it."""
        super().rewrite(edit, node)
        if node.args[0] in edit.flow.values and isinstance(node.args[2], int):
            kept = edit.axis(node.args[0], node.args[1])
            node.update_arg(2, int(kept[: node.args[2] % len(kept)].sum()))


class Pad(Rule):
    """Padding: with a number, which makes a constant channel vary, or with what is there."""

    def forward(self, flow: Flow, node: fx.Node, out: Tensor) -> Value:
        """New features are units of their own; new places belong to the unit around them."""
        x, sizes = argument(node, 0), argument(node, 1)
        if flow.sources(node) != [x] or min(sizes, default=0) < 0:
            return super().forward(flow, node, out)
        value = flow.values[x]
        label, known = value.label, value.known
        for axis, low, high in self._pads(node, out.dim()):
            size = list(label.shape)
            size[axis] += low + high
            if self._numbers(node) and varies(label, axis):
                ends = [
                    fill(label, 0).narrow(axis, 0, 1).expand([n if a == axis else s for a, s in enumerate(label.shape)])
                    for n in (low, high)
                ]
                fresh = [spread(flow.units.fresh(n), axis, end) for n, end in zip((low, high), ends, strict=True)]
                label = torch.cat([fresh[0], label, fresh[1]], axis)
            else:
                flow.units.tie(label, label.narrow(axis, 0, 1).expand(label.shape), "padding repeats it")
                label = label.narrow(axis, 0, 1).expand(size)
            if not self._numbers(node):
                known = everywhere(known, axis).expand(size)
        if self._numbers(node):
            known = torch.constant_pad_nd(known, sizes, True)
        return Value(out, known, label)

    def backward(self, flow: Flow, node: fx.Node, needed: Tensor) -> None:
        """What is inside."""
        for axis, low, high in self._pads(node, needed.dim()):
            if self._numbers(node):
                needed = needed.narrow(axis, low, needed.shape[axis] - low - high)
            else:
                size = list(needed.shape)
                size[axis] -= low + high
                needed = anywhere(needed, axis).expand(size)
        flow.use(node.args[0], needed)

    def rewrite(self, edit: Edit, node: fx.Node) -> None:
        """New features that go are not made."""
        sizes = list(argument(node, 1))
        rank = edit.flow.values[node].tensor.dim()
        for axis, low, high in self._pads(node, rank):
            kept = edit.axis(node, axis)
            if not kept.all():
                at = 2 * (rank - 1 - axis)
                sizes[at : at + 2] = [int(kept[:low].sum()), int(kept[len(kept) - high :].sum())]
        node.update_arg(1, sizes)

    @staticmethod
    def _pads(node: fx.Node, rank: int) -> list[tuple[int, int, int]]:
        sizes = argument(node, 1)
        pairs = [(rank - 1 - i // 2, sizes[i], sizes[i + 1]) for i in range(0, len(sizes), 2)]
        return [pair for pair in pairs if pair[1:] != (0, 0)]

    @staticmethod
    def _numbers(node: fx.Node) -> bool:
        mode = argument(node, 2, "mode")
        return not isinstance(mode, str) or mode == "constant"
