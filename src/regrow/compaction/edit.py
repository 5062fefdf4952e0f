"""Making a graph smaller: parameters are cut, nodes rewritten, what is constant becomes a parameter."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from regrow.compaction.flow import Flow, even
from regrow.compaction.graph import tidy
from regrow.compaction.plan import Plan
from regrow.compaction.units import distinct

aten = torch.ops.aten


class Edit:
    """The graph of a flow while it is being cut.

    Args:
        flow: what is known of the graph; it is read, and its graph is changed.
        plan: what goes.
    """

    def __init__(self, flow: Flow, plan: Plan) -> None:
        self.flow = flow
        self.plan = plan
        self.module = flow.module
        self.graph = flow.module.graph
        self._cuts: dict[tuple[Any, ...], fx.Node] = {}

    def run(self, rewrite: Callable[[Edit, fx.Node], None]) -> None:
        """Rewrite every node."""
        for node in list(self.flow.values):
            if node.op == "call_function":
                rewrite(self, node)
        tidy(self.module)

    def axis(self, node: Any, axis: Any) -> Tensor:
        """(size,) which indices along an axis of a node stay."""
        return self.plan.axis(node, axis)

    def leaves(self, node: fx.Node) -> list[fx.Node]:
        """Tensors among a node's inputs that follow from parameters alone."""
        return self.flow.parameters(node)

    def scaled(self, node: fx.Node, size: fx.Node, new: int, old: int) -> fx.Node:
        """A size that may vary, of which `new` in `old` stay, for the use of a node."""
        common = math.gcd(new, old)
        with self.graph.inserting_before(node):
            more = self.graph.call_function(operator.mul, (size, new // common)) if new > common else size
            return self.graph.call_function(operator.floordiv, (more, old // common))

    def cut(self, leaf: fx.Node, cuts: Mapping[int, Tensor], plus: Tensor | None = None) -> fx.Node:
        """A parameter of what stays of a leaf along each axis, with `plus` added; the leaf itself where all does."""
        if plus is None and all(kept.all() for kept in cuts.values()):
            return leaf
        key = (leaf, tuple((a, tuple(k.tolist())) for a, k in sorted(cuts.items())))
        if plus is None and key in self._cuts:
            return self._cuts[key]
        tensor = self.flow.raw[leaf].detach()
        for axis, kept in cuts.items():
            tensor = tensor.index_select(axis, kept.nonzero().view(-1))
        if plus is not None:
            tensor = (tensor.double() + plus).to(tensor.dtype)
        alone = leaf.op == "get_attr" and len(leaf.users) == 1
        name = str(leaf.target) if leaf.op == "get_attr" else leaf.name
        made = hold(self.module, leaf, name if alone else free(self.module, name), tensor)
        if plus is None:
            self._cuts[key] = made
        return made

    def beside(self, weight: fx.Node, bias: Tensor) -> fx.Node:
        """A bias for the module of a weight that has none."""
        name = str(weight.target) if weight.op == "get_attr" else weight.name
        head = name.removesuffix("weight")
        return hold(self.module, weight, free(self.module, f"{head}bias"), bias.to(self.flow.raw[weight].dtype))


def hold(module: fx.GraphModule, place: fx.Node, name: str, tensor: Tensor) -> fx.Node:
    """A parameter called `name`, read where `place` stands."""
    owner, _, own = name.rpartition(".")
    holder: nn.Module = module
    for part in owner.split(".") if owner else ():
        if not hasattr(holder, part):
            holder.add_module(part, nn.Module())
        holder = getattr(holder, part)
    former = getattr(holder, own, None)
    buffer = isinstance(former, Tensor) and not isinstance(former, nn.Parameter)
    if buffer or not tensor.is_floating_point():
        holder.register_buffer(own, tensor.clone())
    else:
        grad = former.requires_grad if isinstance(former, nn.Parameter) else True
        holder.register_parameter(own, nn.Parameter(tensor.clone(), grad))
    with module.graph.inserting_before(place):
        node = module.graph.get_attr(name)
    node.meta = {"path": place.meta.get("path", "")}
    return node


def free(module: nn.Module, name: str) -> str:
    """`name`, or a like one that nothing has."""
    parts = (module.named_parameters(remove_duplicate=False), module.named_buffers(), module.named_modules())
    taken, number, found = {n for part in parts for n, _ in part}, 0, name
    while found in taken:
        number += 1
        found = f"{name}_{number}"
    return found


def _constant(module: fx.GraphModule, node: fx.Node, tensor: Tensor) -> fx.Node:
    """A parameter in the place of a node that is constant."""
    path = node.meta.get("path")
    return hold(module, node, free(module, f"{path}.constant" if path else "constant"), tensor)


def fold_constants(flow: Flow, is_pointwise: Callable[[fx.Node], bool]) -> bool:
    """Put a parameter where an operand of a pointwise operator is constant; whether there was one.

    What computes the operand is then in no use: a residual branch without active weights is one addition.
    """
    found = False
    for node, value in list(flow.values.items()):
        if node.op != "call_function" or not is_pointwise(node):
            continue
        for source in flow.sources(node):
            others = [flow.values[n].tensor.shape for n in flow.sources(node) if n is not source]
            if not distinct(flow.values[source].known)[0].all() or value.tensor.shape not in others:
                continue
            constant = _collapsed(flow.values[source].tensor, source.meta.get("dynamic", ()))
            if constant is not None:
                found = True
                node.replace_input_with(source, _constant(flow.module, source, constant))
    if found:
        tidy(flow.module)
    return found


def _collapsed(tensor: Tensor, dynamic: tuple[bool, ...]) -> Tensor | None:
    """With size 1 along the axes on which nothing depends; None where it depends on one whose size may vary."""
    for axis in range(tensor.dim()):
        first = tensor.narrow(axis, 0, 1)
        if even(tensor, axis).all():
            tensor = first
        elif axis == 0 or not dynamic or dynamic[axis]:
            return None
    return tensor


def argument(node: fx.Node, index: int, name: str | None = None) -> Any:
    """An argument by its place, or by its name, or None."""
    if name is None:
        arguments = getattr(getattr(node.target, "_schema", None), "arguments", ())
        name = arguments[index].name if index < len(arguments) else ""
    return node.args[index] if index < len(node.args) else node.kwargs.get(name)
