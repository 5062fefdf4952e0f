"""Rules of operators that treat elements, or channels, each by itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from regrow.compaction.edit import Edit, argument
from regrow.compaction.flow import Flow, Followed, Value, along, anywhere, everywhere, fill, name_of, spread, varies
from regrow.compaction.rule import Rule
from regrow.compaction.units import lean

aten = torch.ops.aten


class Pointwise(Rule):
    """Every element of the result is made of those at its place, which go with it."""

    def forward(self, flow: Flow, node: fx.Node, out: Tensor) -> Value:
        """Operands of the full shape are tied; a broadcast one where it meets a single unit."""
        values = [flow.values[n] for n in flow.sources(node)]
        joint = torch.broadcast_shapes(*(v.tensor.shape for v in values))  # type: ignore[no-untyped-call]
        full = [v.label for v in values if v.tensor.shape == joint]
        if not full:
            return super().forward(flow, node, out)
        base, why = full[0], f"{name_of(node)} ties it to what stays"
        for label in full[1:]:
            flow.units.tie(base, label, why)
        for value in values:
            if value.tensor.shape != joint:
                self._tie_broadcast(flow, node, base, value, why)
        return Value(out, self._known(flow, node, out), base.expand(out.shape))

    @staticmethod
    def _tie_broadcast(flow: Flow, node: fx.Node, base: Tensor, value: Value, why: str) -> None:
        label = value.label.view((1,) * (base.dim() - value.label.dim()) + value.label.shape)
        roots, axes = flow.units.find(base), [a for a in range(base.dim()) if base.shape[a] != label.shape[a]]
        least = roots.amin(axes, keepdim=True)
        same = least == roots.amax(axes, keepdim=True)
        flow.units.tie(least[same], label[same], why)
        flow.units.pin(label[~same], f"{name_of(node)} spreads it over several units")

    @staticmethod
    def _known(flow: Flow, node: fx.Node, out: Tensor) -> Tensor:
        known = fill(out, True)
        for source in flow.sources(node):
            known = _both(known, flow.values[source].known.expand(out.shape))
        if getattr(node.target, "overloadpacket", None) is aten.mul:
            for operand in node.args:
                factor = flow.raw[operand] if isinstance(operand, fx.Node) else operand
                if isinstance(factor, Tensor) and (factor == 0).any():
                    sure = flow.values[operand].known if operand in flow.values else True
                    known = known | ((factor == 0) & sure).expand(out.shape)
        return known

    def backward(self, flow: Flow, node: fx.Node, needed: Tensor) -> None:
        """What is used of an operand is used at its place."""
        for source in flow.sources(node):
            flow.use(source, gather(needed, flow.values[source].tensor.shape))

    def follow(self, flow: Flow, node: fx.Node) -> list[Followed]:
        """Parameters among the operands, as the result."""
        label = flow.values[node].label
        return [f for leaf in flow.parameters(node) for f in flow.along_one(leaf, label, name_of(node))]

    def rewrite(self, edit: Edit, node: fx.Node) -> None:
        """Parameters among the operands follow the result."""
        rank = edit.flow.values[node].tensor.dim()
        for leaf in edit.leaves(node):
            shape = edit.flow.raw[leaf].shape
            first = rank - len(shape)
            cuts = {a: edit.axis(node, first + a) for a, size in enumerate(shape) if size > 1}
            node.replace_input_with(leaf, edit.cut(leaf, cuts))


def _both(a: Tensor, b: Tensor) -> Tensor:
    return lean(torch.logical_and, a, b)


class Channelwise(Rule):
    """One parameter for each channel, axis 1: batch norm with running statistics, PReLU."""

    def forward(self, flow: Flow, node: fx.Node, out: Tensor) -> Value:
        """A channel is constant where its input is, or where its scale is zero."""
        x = node.args[0]
        if x not in flow.values or len(flow.sources(node)) > 1 or out.dim() < 2:
            return super().forward(flow, node, out)
        value, known = flow.values[x], flow.values[x].known
        scale = node.args[1] if getattr(node.target, "overloadpacket", None) is aten.batch_norm else None
        if isinstance(scale, fx.Node):
            known = lean(torch.logical_or, known, spread(flow.raw[scale] == 0, 1, out))
        return Value(out, known, value.label)

    def backward(self, flow: Flow, node: fx.Node, needed: Tensor) -> None:
        """Every element by itself."""
        flow.use(node.args[0], needed)

    def follow(self, flow: Flow, node: fx.Node) -> list[Followed]:
        """Parameters, as the channels."""
        return _channels(flow, node)

    def rewrite(self, edit: Edit, node: fx.Node) -> None:
        """Parameters follow the channels."""
        for leaf in edit.leaves(node):
            if edit.flow.raw[leaf].numel() > 1:
                node.replace_input_with(leaf, edit.cut(leaf, {0: edit.axis(node, 1)}))


class Together(Rule):
    """Elements along some axes are computed from one another: softmax, layer norm. They stay or go together."""

    def __init__(self, axes: Any) -> None:
        self.axes = axes
        """Which axes: (node, rank) -> a sequence."""

    def forward(self, flow: Flow, node: fx.Node, out: Tensor) -> Value:
        """Constant where all of them are, or where a scale is zero."""
        x = node.args[0]
        if flow.sources(node) != [x]:
            return super().forward(flow, node, out)
        value = flow.values[x]
        label, known = value.label, value.known
        for axis in self.axes(node, out.dim()):
            flow.units.tie(label, label.narrow(axis, 0, 1).expand(label.shape), f"{name_of(node)} runs over it")
            known = everywhere(known, axis)
        scale = argument(node, 2) if self.axes is normalized else None
        if isinstance(scale, fx.Node):
            known = known | (flow.raw[scale] == 0)
        return Value(out, known.expand(out.shape), label)

    def backward(self, flow: Flow, node: fx.Node, needed: Tensor) -> None:
        """All of them, where one is used."""
        for axis in self.axes(node, needed.dim()):
            needed = anywhere(needed, axis)
        flow.use(node.args[0], needed.expand(flow.raw[node].shape))


def normalized(node: fx.Node, rank: int) -> Sequence[int]:
    """The axes of a layer norm."""
    shape = node.args[1]
    assert isinstance(shape, list | tuple)
    return range(rank - len(shape), rank)


def one_axis(node: fx.Node, rank: int) -> Sequence[int]:
    """The axis that is an operator's second argument."""
    axis = node.args[1]
    assert isinstance(axis, int)
    return [axis % rank]


class GroupNorm(Rule):
    """Channels of a group share statistics: they stay or go together."""

    def forward(self, flow: Flow, node: fx.Node, out: Tensor) -> Value:
        """Constant where the group is, or where the scale is zero."""
        x, groups = node.args[0], node.args[1]
        if flow.sources(node) != [x] or not isinstance(groups, int):
            return super().forward(flow, node, out)
        value = flow.values[x]
        flow.units.tie(value.label, _group_wise(value.label, groups), f"{name_of(node)} runs over its group")
        split = value.known.reshape(out.shape[0], groups, -1)
        known = everywhere(split, 2).expand(split.shape).reshape(out.shape)
        scale = argument(node, 2)
        if isinstance(scale, fx.Node):
            known = lean(torch.logical_or, known, spread(flow.raw[scale] == 0, 1, out))
        return Value(out, known, value.label)

    def backward(self, flow: Flow, node: fx.Node, needed: Tensor) -> None:
        """The whole group, where one channel is used."""
        split = needed.reshape(needed.shape[0], argument(node, 1), -1)
        flow.use(node.args[0], anywhere(split, 2).expand(split.shape).reshape(needed.shape))

    def follow(self, flow: Flow, node: fx.Node) -> list[Followed]:
        """Parameters, as the channels, of which those of a group are tied."""
        return _channels(flow, node)

    def rewrite(self, edit: Edit, node: fx.Node) -> None:
        """Fewer groups."""
        kept, groups = edit.axis(node, 1), node.args[1]
        assert isinstance(groups, int)
        node.update_arg(1, groups * int(kept.sum()) // len(kept))
        for leaf in edit.leaves(node):
            node.replace_input_with(leaf, edit.cut(leaf, {0: kept}))


def _channels(flow: Flow, node: fx.Node) -> list[Followed]:
    """Parameters with one number for each channel."""
    label = flow.units.find(flow.values[node].label)
    leaves = [leaf for leaf in flow.parameters(node) if flow.raw[leaf].numel() > 1]
    if leaves and any(varies(label, a) for a in range(label.dim()) if a != 1):
        flow.units.pin(label, f"{name_of(node)} reads it along several axes")
        return []
    return [Followed(leaf, 0, along(label, 1)) for leaf in leaves]


def _group_wise(label: Tensor, groups: int) -> Tensor:
    """The first label of its group at every element."""
    split = label.reshape(label.shape[0], groups, -1)
    return split[:, :, :1].expand(split.shape).reshape(label.shape)


class Reduction(Rule):
    """A mean, a sum or a maximum over axes along which units do not change: positions, not features."""

    def forward(self, flow: Flow, node: fx.Node, out: Tensor) -> Value:
        """Constant where all that is reduced is."""
        x = node.args[0]
        if flow.sources(node) != [x]:
            return super().forward(flow, node, out)
        value = flow.values[x]
        axes, keep = self._axes(node, value.tensor.dim())
        if any(varies(value.label, a) for a in axes):
            return super().forward(flow, node, out)
        known, label = value.known, value.label
        for axis in axes:
            known, label = everywhere(known, axis), label.narrow(axis, 0, 1)
        if not keep:
            known, label = (t.squeeze(tuple(axes)) for t in (known, label))
        return Value(out, known, label)

    def backward(self, flow: Flow, node: fx.Node, needed: Tensor) -> None:
        """All that is reduced."""
        x = flow.values[node.args[0]].tensor
        axes, keep = self._axes(node, x.dim())
        for axis in sorted(axes) if not keep else ():
            needed = needed.unsqueeze(axis)
        flow.use(node.args[0], needed.expand(x.shape))

    @staticmethod
    def _axes(node: fx.Node, rank: int) -> tuple[list[int], bool]:
        axes = argument(node, 1, "dim")
        axes = [axes] if isinstance(axes, int) else list(axes or range(rank))
        return [a % rank for a in axes], bool(argument(node, 2, "keepdim"))


class Window(Rule):
    """Pooling and resizing: each channel by itself, over the last axes."""

    def __init__(self, axes: int) -> None:
        self.axes = axes

    def forward(self, flow: Flow, node: fx.Node, out: Tensor) -> Value:
        """A channel is constant where all of it is; its values may still differ from place to place."""
        x = node.args[0]
        if flow.sources(node) != [x]:
            return super().forward(flow, node, out)
        value = flow.values[x]
        label, known = value.label, value.known
        for axis in range(-self.axes, 0):
            first = label.narrow(axis, 0, 1)
            flow.units.tie(label, first.expand(label.shape), f"{name_of(node)} mixes it with others")
            label, known = first, everywhere(known, axis)
        return Value(out, known.expand(out.shape), label.expand(out.shape))

    def backward(self, flow: Flow, node: fx.Node, needed: Tensor) -> None:
        """The whole channel."""
        for axis in range(-self.axes, 0):
            needed = anywhere(needed, axis)
        flow.use(node.args[0], needed.expand(flow.raw[node.args[0]].shape))


class Lookup(Rule):
    """An embedding: its columns are units."""

    def forward(self, flow: Flow, node: fx.Node, out: Tensor) -> Value:
        """A column is constant where all its rows are equal."""
        if node.args[0] not in flow.leaves:
            return super().forward(flow, node, out)
        table = flow.raw[node.args[0]]
        known = (table == table[:1]).all(0)
        return Value(out, spread(known, -1, out), spread(flow.units.fresh(table.shape[1]), -1, out))

    def origin(self, flow: Flow, node: fx.Node) -> tuple[fx.Node, int] | None:
        """Columns of the table."""
        table = argument(node, 0)
        return (table, -1) if table in flow.leaves else None

    def backward(self, flow: Flow, node: fx.Node, needed: Tensor) -> None:
        """All indices."""
        for source in flow.sources(node):
            flow.use(source, fill(flow.raw[source], True))

    def follow(self, flow: Flow, node: fx.Node) -> list[Followed] | None:
        """Columns of the table."""
        table = argument(node, 0)
        return [Followed(table, 1, along(flow.values[node].label, -1))] if table in flow.leaves else None

    def rewrite(self, edit: Edit, node: fx.Node) -> None:
        """Fewer columns."""
        table = node.args[0]
        assert isinstance(table, fx.Node)
        node.update_arg(0, edit.cut(table, {1: edit.axis(node, -1)}))


def gather(needed: Tensor, shape: Sequence[int]) -> Tensor:
    """Which elements of a tensor of `shape`, broadcast to that of `needed`, are needed anywhere."""
    while needed.dim() > len(shape):
        needed = needed.any(0)
    for axis, size in enumerate(shape):
        if size != needed.shape[axis]:
            needed = anywhere(needed, axis)
    return needed
