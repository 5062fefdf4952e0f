"""Rules of linear maps and convolutions by a parameter: where units begin, and where constants can be folded."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from regrow.compaction.edit import Edit, argument
from regrow.compaction.flow import Flow, Followed, Value, all_but, along, any_but, even, fill, name_of, spread
from regrow.compaction.plan import Plan
from regrow.compaction.rule import Rule

aten = torch.ops.aten


class Operands(NamedTuple):
    """A product's operands, and how its weight lies."""

    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    out_axis: int
    in_axis: int
    groups: int
    features: int
    """The axis of features, counted from the last, in inputs and results."""
    padded: bool
    """Whether a constant input can make a result that differs from place to place."""


class Product(Rule):
    """Each output feature is a new unit: a sum over input features, plus a bias."""

    def __init__(self, other: Rule | None = None) -> None:
        self.other = other or Rule()
        """What it is where both operands depend on inputs."""

    def forward(self, flow: Flow, node: fx.Node, out: Tensor) -> Value:
        """An output is constant where none of the inputs that vary reaches it."""
        o = self._operands(flow, node)
        if o is None:
            return self.other.forward(flow, node, out)
        value = flow.values[o.x]
        first = along(value.label, o.features)
        flow.units.tie(value.label, spread(first, o.features, value.label))
        reach = _reach(flow.raw[o.weight], o)
        varying = ~all_but(value.known, o.features)
        known = ~(reach & varying).any(1)
        labels = flow.units.fresh(len(known))
        return Value(out, spread(known, o.features, out), spread(labels, o.features, out))

    def backward(self, flow: Flow, node: fx.Node, needed: Tensor) -> None:
        """An input is used where its weight to a needed output is not zero."""
        o = self._operands(flow, node)
        if o is None:
            return self.other.backward(flow, node, needed)
        outputs = any_but(needed, o.features)
        used = (_reach(flow.raw[o.weight], o) & outputs[:, None]).any(0)
        flow.use(o.x, spread(used, o.features, flow.values[o.x].tensor))

    def origin(self, flow: Flow, node: fx.Node) -> tuple[fx.Node, int] | None:
        """Its output features."""
        o = self._operands(flow, node)
        return None if o is None else (o.weight, o.features)

    def follow(self, flow: Flow, node: fx.Node) -> list[Followed] | None:
        """Rows, columns and biases; in a convolution of groups, only where a group is one channel."""
        o = self._operands(flow, node)
        if o is None:
            return self.other.follow(flow, node)
        inputs, outputs = (along(flow.values[n].label, o.features) for n in (o.x, node))
        found = [] if o.bias is None else [Followed(o.bias, 0, outputs)]
        if o.groups == 1:
            return [*found, Followed(o.weight, o.out_axis, outputs, True), Followed(o.weight, o.in_axis, inputs)]
        if o.groups == len(inputs) == len(outputs):
            flow.units.tie(inputs, outputs, f"{name_of(node)} maps each channel to one")
            return [*found, Followed(o.weight, 0, outputs)]
        for label in (inputs, outputs):
            flow.units.pin(label, f"{name_of(node)} has groups of channels")
        return found

    def constrain(self, plan: Plan, node: fx.Node) -> None:
        """A constant goes only where its effect is the same everywhere; groups go whole."""
        o = self._operands(plan.flow, node)
        if o is None:
            return self.other.constrain(plan, node)
        value = plan.flow.values[o.x]
        labels = along(value.label, o.features)
        inputs, outputs = plan.axis(o.x, o.features), plan.axis(node, o.features)
        if o.groups > 1:
            _keep_groups_whole(plan, node, o, inputs, outputs)
            return
        # A constant output that stays must be right even if nothing varies with it: its value may be folded further on.
        used = any_but(plan.flow.used.get(node, fill(plan.flow.raw[node], False)), o.features)
        used = outputs & (used | any_but(plan.flow.values[node].known, o.features))
        reaches = (_reach(plan.flow.raw[o.weight], o) & used[:, None]).any(0)
        constant = all_but(value.known, o.features)
        folded = ~inputs & constant & reaches
        here, labels = _rows(value.tensor.movedim(o.features, 0)[folded], 0), labels[folded]
        steady, is_zero = even(here, 1).all(1), (here == 0).all(1)
        plan.restore(labels[~steady], f"it is constant, but not the same everywhere, before {name_of(node)}")
        if o.padded:
            plan.restore(labels[~is_zero], f"it is a constant that {name_of(node)} pads with zeros")

    def rewrite(self, edit: Edit, node: fx.Node) -> None:
        """Fewer rows and columns; constants that go into the bias."""
        o = self._operands(edit.flow, node)
        if o is None:
            return self.other.rewrite(edit, node)
        outputs, inputs = edit.axis(node, o.features), edit.axis(o.x, o.features)
        weight = edit.flow.raw[o.weight]
        cuts = {o.out_axis: outputs, o.in_axis: inputs}
        if o.groups > 1:
            cuts = {0: inputs if o.out_axis else outputs}
            self._set(node, 6, int(o.groups * inputs.sum()) // len(inputs))
        folded = None if o.groups > 1 else _folded(edit, o, weight, inputs, outputs)
        node.replace_input_with(o.weight, edit.cut(o.weight, cuts))
        if o.bias is not None and (folded is not None or not outputs.all()):
            node.replace_input_with(o.bias, edit.cut(o.bias, {0: outputs}, plus=folded))
        elif folded is not None:
            self._add_bias(edit, node, edit.beside(o.weight, folded))

    @staticmethod
    def _add_bias(edit: Edit, node: fx.Node, bias: fx.Node) -> None:
        packet = getattr(node.target, "overloadpacket", None)
        if packet in (aten.mm, aten.matmul):
            with edit.graph.inserting_after(node):
                added = edit.graph.call_function(aten.add.Tensor, (node, bias))
            added.meta = dict(node.meta)
            node.replace_all_uses_with(added, delete_user_cb=lambda user: user is not added)
        else:
            Product._set(node, 2, bias)

    @staticmethod
    def _set(node: fx.Node, index: int, value: Any) -> None:
        target: Any = node.target
        names = [a.name for a in target._schema.arguments]
        defaults = [a.default_value for a in target._schema.arguments]
        if names[index] in node.kwargs:
            node.update_kwarg(names[index], value)
        else:
            node.args = (*node.args[:index], *defaults[len(node.args) : index], value, *node.args[index + 1 :])

    def _operands(self, flow: Flow, node: fx.Node) -> Operands | None:
        """None where this is no product of an input by parameters."""
        packet = getattr(node.target, "overloadpacket", None)
        x, weight, bias = (argument(node, i) for i in _ORDER.get(packet, (0, 1, 2)))
        bias = None if packet in (aten.mm, aten.matmul) else bias
        plain = x in flow.values and weight in flow.leaves and (bias is None or bias in flow.leaves)
        if not plain or node.kwargs.keys() & {"alpha", "beta"} or flow.sources(node) != [x]:
            return None
        if packet is aten.linear or packet in (aten.addmm, aten.mm, aten.matmul):
            rank = flow.raw[weight].dim()
            if rank != 2 or (bias is not None and flow.raw[bias].dim() != 1):
                return None
            out_axis = 0 if packet is aten.linear else 1
            return Operands(x, weight, bias, out_axis, 1 - out_axis, 1, -1, False)
        axes = flow.raw[weight].dim() - 2
        groups = argument(node, 6) or 1
        transposed = packet in _TRANSPOSED
        if isinstance(groups, bool | list):
            return None
        return Operands(
            x, weight, bias, int(transposed), int(not transposed), groups, -1 - axes, transposed or _pads(node, axes)
        )


_TRANSPOSED = (aten.conv_transpose1d, aten.conv_transpose2d, aten.conv_transpose3d)
_ORDER: dict[Any, tuple[int, int, int]] = {aten.addmm: (1, 2, 0)}


def _pads(node: fx.Node, axes: int) -> bool:
    padding = argument(node, 4)
    if isinstance(padding, str):
        return padding != "valid"
    return any([padding] if isinstance(padding, int) else padding or [0] * axes)


def _reach(weight: Tensor, o: Operands) -> Tensor:
    """(outputs, inputs) bool: whether an input has a weight to an output that is not zero."""
    nonzero = weight.movedim((o.out_axis, o.in_axis), (0, 1)).flatten(2) != 0 if weight.dim() > 2 else None
    reach = nonzero.any(2) if nonzero is not None else (weight if o.out_axis == 0 else weight.t()) != 0
    if o.groups == 1:
        return reach
    # A weight of groups holds its own block of each: rows of all groups (or, transposed, columns) one after the other.
    blocks = reach.chunk(o.groups, o.out_axis)
    full: Tensor = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
    return full.bool()


def _rows(tensor: Tensor, axis: int) -> Tensor:
    """(features, everything else)."""
    return tensor.movedim(axis, 0).unsqueeze(-1).flatten(1)


def _keep_groups_whole(plan: Plan, node: fx.Node, o: Operands, inputs: Tensor, outputs: Tensor) -> None:
    """A group loses all its inputs and outputs or none."""
    stays = inputs.view(o.groups, -1).any(1) | outputs.view(o.groups, -1).any(1)
    for source in (o.x, node):
        labels = along(plan.flow.values[source].label, o.features).view(o.groups, -1)
        plan.restore(labels[stays], f"{name_of(node)} would have uneven groups")


def _folded(edit: Edit, o: Operands, weight: Tensor, inputs: Tensor, outputs: Tensor) -> Tensor | None:
    """What constants that go add to the outputs that stay, in float64; None for nothing."""
    value = edit.flow.values[o.x]
    gone = ~inputs & all_but(value.known, o.features)
    constants = along(value.tensor, o.features)[gone].double()
    if not constants.any():
        return None
    sums = (
        weight.double().movedim((o.out_axis, o.in_axis), (0, 1)).flatten(2).sum(2)
        if weight.dim() > 2
        else (weight.double() if o.out_axis == 0 else weight.double().t())
    )
    folded = sums[outputs][:, gone] @ constants
    return folded if folded.any() else None
