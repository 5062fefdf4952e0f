"""What is known of every element of every tensor: whether it is constant, whether it is used, what it goes with.

A graph is run once on the example. Beside each tensor stands which of its elements do not depend on the model's inputs,
and a label for each element. Then it is walked back, to find which elements any output depends on. What each operator
says of that is a `Rule`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, fx

from regrow.compaction.units import Units, distinct, lean


class Value(NamedTuple):
    """A tensor of the graph; all three have its shape."""

    tensor: Tensor
    known: Tensor
    """Which elements are the same for all inputs."""
    label: Tensor
    """What each element goes with, in `Flow.units`."""


class Followed(NamedTuple):
    """A parameter whose indices along an axis go with elements of a tensor."""

    leaf: fx.Node
    axis: int
    label: Tensor
    """(size of the axis,) what each index goes with."""
    is_output: bool = False
    """Whether these are the outputs of a weight."""


class Passes(Protocol):
    """What one kind of operator does to what is known."""

    def forward(self, flow: Flow, node: fx.Node, out: Tensor) -> Value:
        """What is known of the result `out` of a node."""
        ...

    def backward(self, flow: Flow, node: fx.Node, needed: Tensor) -> None:
        """Mark what of its inputs a node uses, where `needed` of its own elements are."""
        ...

    def follow(self, flow: Flow, node: fx.Node) -> list[Followed] | None:
        """Which parameters move along when elements change places, None where that is not known."""
        ...


class Flow:
    """All that is known of the tensors of a graph.

    Args:
        module: the graph with its parameters.
        inputs: the tensors and other values of its placeholders, in order.
        rule: what the operator of a node does.
    """

    def __init__(self, module: fx.GraphModule, inputs: Sequence[Any], rule: Callable[[fx.Node], Passes]) -> None:
        self.module = module
        self.rule = rule
        self.units = Units()
        self.raw: dict[Any, Any] = {}
        """What the example makes of each node."""
        self.leaves: set[Any] = set()
        """Nodes that follow from parameters alone."""
        self.still: set[Any] = set()
        """Nodes that follow from parameters and sizes."""
        self.values: dict[Any, Value] = {}
        """Tensors that follow from inputs, or whose sizes do."""
        self.entries: dict[tuple[fx.Node, fx.Node], Value] = {}
        """Leaves as their elements go with those of what moves them: (mover, leaf)."""
        self.used: dict[fx.Node, Tensor] = {}
        given = iter(inputs)
        with torch.no_grad():
            for node in module.graph.nodes:
                self._forward(node, given)
            for node in reversed(module.graph.nodes):
                self._backward(node)

    def sources(self, node: fx.Node) -> list[fx.Node]:
        """Tensors that a node reads and that are no leaves."""
        return [n for n in node.all_input_nodes if n in self.values]

    def parameters(self, node: fx.Node) -> list[fx.Node]:
        """Tensors that a node reads and that follow from parameters alone."""
        return [n for n in node.all_input_nodes if n in self.leaves and isinstance(self.raw[n], Tensor)]

    def load(self, argument: Any) -> Any:
        """What arguments of a node are for the example."""
        return fx.map_arg(argument, lambda n: self.raw[n])

    def use(self, node: Any, where: Tensor) -> None:
        """Mark elements of a node as used."""
        if node in self.values:
            self.used[node] = where if node not in self.used else lean(torch.logical_or, self.used[node], where)

    def pin_inputs(self, node: fx.Node) -> None:
        """All that a node is given stays."""
        for source in self.sources(node):
            self.units.pin(self.values[source].label, f"{name_of(node)} needs all of it")

    def use_inputs(self, node: fx.Node) -> None:
        """All that a node is given is used."""
        for source in self.sources(node):
            self.use(source, fill(self.values[source].tensor, True))

    def needed(self, node: fx.Node) -> Tensor:
        """Which elements of a node are used and not constant."""
        value = self.values[node]
        return lean(lambda used, known: used & ~known, self.used.get(node, fill(value.tensor, False)), value.known)

    def along_one(self, leaf: fx.Node, label: Tensor, what: str) -> list[Followed]:
        """A parameter that meets elements of `label` one by one, from the last axis on; pinned if along several."""
        shape, label = self.raw[leaf].shape, self.units.find(label)
        axes = [a for a in range(label.dim()) if varies(label, a)]
        first = label.dim() - len(shape)
        met = [a for a in axes if a >= first and shape[a - first] > 1]
        if met and len(axes) > 1:
            self.units.pin(label, f"{what} reads it along several axes")
            return []
        return [Followed(leaf, a - first, along(label, a)) for a in met]

    def _forward(self, node: fx.Node, given: Any) -> None:
        if node.op == "placeholder":
            out = next(given)
            if isinstance(out, Tensor):
                label = self.units.fresh(1)
                self.units.pin(label, "it is an input of the model")
                self.values[node] = Value(out, fill(out, False), label.view((1,) * out.dim()).expand(out.shape))
        elif node.op == "get_attr":
            out = attribute(self.module, node.target)
            self.leaves.add(node)
        elif node.op == "output":
            for source in self.sources(node):
                self.units.pin(self.values[source].label, "it is an output of the model")
            return
        else:
            assert callable(node.target)
            out = node.target(*self.load(node.args), **self.load(node.kwargs))
        self.raw[node] = out
        if node.op == "get_attr" or getattr(node.target, "overloadpacket", None) is torch.ops.aten.sym_size:
            self.still.add(node)
        elif node.op == "call_function" and follows(node, self.still):
            self.still.add(node)
        if node.op != "call_function":
            return
        if follows(node, self.leaves):
            self.leaves.add(node)
        elif isinstance(out, Tensor):
            self.values[node] = value = self.rule(node).forward(self, node, out)
            self.raw[node] = value.tensor
        else:
            self.pin_inputs(node)

    def _backward(self, node: fx.Node) -> None:
        if node.op == "output" or (node.op == "call_function" and node not in self.values and node not in self.leaves):
            self.use_inputs(node)
        elif node.op == "call_function" and node in self.values and distinct(needed := self.needed(node))[0].any():
            self.rule(node).backward(self, node, needed)


def follows(node: fx.Node, leaves: set[fx.Node]) -> bool:
    """Whether a call reads nothing but `leaves`, and does not draw."""
    random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    return not random and all(n in leaves for n in node.all_input_nodes)


def attribute(module: torch.nn.Module, target: Any) -> Any:
    """A parameter or buffer by its dotted name."""
    for part in str(target).split("."):
        module = getattr(module, part)
    return module


def name_of(node: fx.Node) -> str:
    """What a reader calls a node: the operator and the module."""
    packet = getattr(node.target, "overloadpacket", node.target)
    operator = getattr(packet, "__name__", str(packet))
    path = node.meta.get("path")
    return f"{operator} in {path}" if path else operator


def fill(like: Tensor, value: bool | int) -> Tensor:
    """One value at every element, without memory."""
    return torch.tensor(value).expand(like.shape)


def varies(tensor: Tensor, axis: int) -> bool:
    """Whether a tensor changes along an axis."""
    (tensor,) = distinct(tensor) if tensor.stride(axis) == 0 else [tensor]
    return tensor.shape[axis] > 1 and bool((tensor != tensor.narrow(axis, 0, 1)).any())


def along(tensor: Tensor, axis: int) -> Tensor:
    """The elements along one axis, (size,), at the first index of all others."""
    axis %= tensor.dim()
    for other in reversed(range(tensor.dim())):
        if other != axis:
            tensor = tensor.select(other, 0)
    return tensor


def spread(vector: Tensor, axis: int, like: Tensor) -> Tensor:
    """A vector (size,) along one axis of the shape of `like`, without memory."""
    shape = [1] * like.dim()
    shape[axis] = -1
    return vector.view(shape).expand(like.shape)


def even(tensor: Tensor, axis: int) -> Tensor:
    """Which elements are, but for rounding, those at the first index of an axis."""
    first = tensor.narrow(axis, 0, 1)
    if not tensor.is_floating_point():
        return tensor == first
    return (tensor - first).abs() <= 16 * torch.finfo(tensor.dtype).eps * first.abs()


def anywhere(where: Tensor, *axes: int) -> Tensor:
    """`where.any` over axes that keep size 1, reading each different element once."""
    for axis in axes:
        where = where.narrow(axis, 0, 1) if where.stride(axis) == 0 else where.any(axis, keepdim=True)
    return where


def everywhere(where: Tensor, *axes: int) -> Tensor:
    """`where.all` over axes that keep size 1, reading each different element once."""
    for axis in axes:
        where = where.narrow(axis, 0, 1) if where.stride(axis) == 0 else where.all(axis, keepdim=True)
    return where


def any_but(where: Tensor, axis: int) -> Tensor:
    """(size,) whether anything is true at each index of an axis."""
    where = where.movedim(axis, 0)
    for other in range(1, where.dim()):
        if where.stride(other) == 0 and where.shape[other]:
            where = where.narrow(other, 0, 1)
    return where.reshape(len(where), -1).any(1)


def all_but(where: Tensor, axis: int) -> Tensor:
    """(size,) whether all is true at each index of an axis."""
    return ~any_but(lean(torch.logical_not, where), axis)
