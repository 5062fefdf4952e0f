"""Making a graph smaller: parameters are cut, nodes rewritten, what is constant becomes a parameter."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from regrow.compaction.flow import Flow

if TYPE_CHECKING:
    from regrow.compaction.plan import Plan

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
        self._scaled: dict[tuple[fx.Node, int, int], fx.Node] = {}

    def run(self) -> None:
        """Rewrite every node."""
        for node in list(self.flow.values):
            if node.op == "call_function":
                self.flow.rules.of(node, self.flow).rewrite(self, node)
        tidy(self.module)

    def axis(self, node: Any, axis: Any) -> Tensor:
        """(size,) which indices along an axis of a node stay."""
        return self.plan.axis(node, axis)

    def leaves(self, node: fx.Node) -> list[fx.Node]:
        """Tensors among a node's inputs that follow from parameters alone."""
        return [n for n in node.all_input_nodes if n in self.flow.leaves and isinstance(self.flow.raw[n], Tensor)]

    def scaled(self, size: fx.Node, times: int, over: int) -> fx.Node:
        """A size that may vary, times a fraction, at the present place in the graph."""
        more = self.graph.call_function(operator.mul, (size, times)) if times > 1 else size
        return self.graph.call_function(operator.floordiv, (more, over))

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
        made = self._hold(leaf, name if alone else self._free(name), tensor)
        if plus is None:
            self._cuts[key] = made
        return made

    def beside(self, weight: fx.Node, bias: Tensor) -> fx.Node:
        """A bias for the module of a weight that has none."""
        name = str(weight.target) if weight.op == "get_attr" else weight.name
        head = name.removesuffix("weight")
        return self._hold(weight, self._free(f"{head}bias"), bias.to(self.flow.raw[weight].dtype))

    def constant(self, node: fx.Node, tensor: Tensor) -> fx.Node:
        """A parameter in the place of a node that is constant."""
        return self._hold(node, self._free(node.name), tensor)

    def _hold(self, place: fx.Node, name: str, tensor: Tensor) -> fx.Node:
        """A parameter called `name`, read where `place` stands."""
        owner, _, own = name.rpartition(".")
        module: nn.Module = self.module
        for part in owner.split(".") if owner else ():
            if not hasattr(module, part):
                module.add_module(part, nn.Module())
            module = getattr(module, part)
        former = getattr(module, own, None)
        tensor = tensor.clone()
        if isinstance(former, Tensor) and not isinstance(former, nn.Parameter):
            module.register_buffer(own, tensor)
        elif tensor.is_floating_point():
            grad = former.requires_grad if isinstance(former, nn.Parameter) else True
            module.register_parameter(own, nn.Parameter(tensor, grad))
        else:
            module.register_buffer(own, tensor)
        first = next(iter(self.graph.nodes))
        with self.graph.inserting_before(first):
            node = self.graph.get_attr(name)
        node.meta = {"path": place.meta.get("path", "")}
        return node

    def _free(self, name: str) -> str:
        """`name`, or a like one that nothing has."""
        taken = {n for n, _ in self.module.named_parameters(remove_duplicate=False)} | {n for n, _ in self.module.named_buffers()}
        taken |= {n for n, _ in self.module.named_modules()}
        number, found = 0, name
        while found in taken:
            number += 1
            found = f"{name}_{number}"
        return found


def fold_constants(flow: Flow) -> bool:
    """Put a parameter where an operand of a pointwise operator is constant; whether there was one.

    What computes the operand is then in no use: a residual branch without active weights is one addition.
    """
    edit, found = Edit(flow, None), False  # type: ignore[arg-type]
    for node, value in list(flow.values.items()):
        if node.op != "call_function" or flow.rules.of(node, flow) is not flow.rules.pointwise:
            continue
        for source in flow.sources(node):
            others = [flow.values[n].tensor.shape for n in flow.sources(node) if n is not source]
            if not flow.values[source].known.all() or value.tensor.shape not in others:
                continue
            constant = _collapsed(flow.values[source].tensor, source.meta.get("dynamic", ()))
            if constant is not None:
                found = True
                node.replace_input_with(source, edit.constant(source, constant))
    if found:
        tidy(flow.module)
    return found


def _collapsed(tensor: Tensor, dynamic: tuple[bool, ...]) -> Tensor | None:
    """With size 1 along the axes on which nothing depends; None where it depends on one whose size may vary."""
    for axis in range(tensor.dim()):
        first = tensor.narrow(axis, 0, 1)
        if (tensor == first).all():
            tensor = first
        elif axis == 0 or not dynamic or dynamic[axis]:
            return None
    return tensor


def tidy(module: fx.GraphModule) -> None:
    """Forget nodes that nothing uses, then parameters that nothing reads."""
    module.graph.eliminate_dead_code()
    module.graph.lint()
    module.delete_all_unused_submodules()
    read = {str(n.target) for n in module.graph.nodes if n.op == "get_attr"}
    for name in [n for n, _ in module.named_parameters(remove_duplicate=False)] + [n for n, _ in module.named_buffers()]:
        if name not in read:
            owner, _, own = name.rpartition(".")
            delattr(module.get_submodule(owner), own)
    module.recompile()


def argument(node: fx.Node, index: int, name: str | None = None) -> Any:
    """An argument by its place, or by its name, or None."""
    if name is None:
        arguments = getattr(getattr(node.target, "_schema", None), "arguments", ())
        name = arguments[index].name if index < len(arguments) else ""
    return node.args[index] if index < len(node.args) else node.kwargs.get(name)
