"""Rules of attention: heads are units of queries, keys and scores; features of values are units of their own."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from regrow.compaction.edit import argument
from regrow.compaction.flow import Flow, Followed, Value, anywhere, even, everywhere, fill, name_of, varies
from regrow.compaction.plan import Plan
from regrow.compaction.rule import Rule

aten = torch.ops.aten


class MatMul(Rule):
    """A product (..., n, k) x (..., k, m) of two tensors that both depend on inputs.

    Where features run along k (queries by keys), all of a matrix is one unit. Where they run along m alone (weights by
    values), they go on, and a matrix of weights goes if all values do that it weighs.
    """

    def forward(self, flow: Flow, node: fx.Node, out: Tensor) -> Value:
        """Constant where both factors are, or where weights that sum to 1 weigh equal constants."""
        sources = flow.sources(node)
        if len(sources) != 2 or sources != list(node.args) or not self._fits(flow, node):
            return super().forward(flow, node, out)
        a, b = (flow.values[n] for n in sources)
        if varies(a.label, -1) or varies(b.label, -2):
            head = one_unit(flow, a.label, b.label, name_of(node))
            known = everywhere(a.known, -1) & everywhere(b.known, -2)
            return Value(out, known, head.expand(out.shape))
        if varies(a.label, -2):
            return super().forward(flow, node, out)
        return _mean(out, b, sums_to_one(sources[0]))

    def backward(self, flow: Flow, node: fx.Node, needed: Tensor) -> None:
        """Rows of the first and columns of the second factor."""
        sources = flow.sources(node)
        if len(sources) != 2 or sources != list(node.args) or not self._fits(flow, node):
            return super().backward(flow, node, needed)
        a, b = (flow.values[n].tensor for n in sources)
        flow.use(sources[0], anywhere(needed, -1).expand(a.shape))
        flow.use(sources[1], anywhere(needed, -2).expand(b.shape))

    def follow(self, flow: Flow, node: fx.Node) -> list[Followed]:
        """Heads and their features stay where they are."""
        flow.pin_inputs(node)
        return []

    def constrain(self, plan: Plan, node: fx.Node) -> None:
        """A matrix stays in both factors or in none."""
        sources = plan.flow.sources(node)
        if len(sources) == 2 and sources == list(node.args) and self._fits(plan.flow, node):
            same_heads(plan, node, sources)

    @staticmethod
    def _fits(flow: Flow, node: fx.Node) -> bool:
        a, b = (flow.values[n].tensor for n in flow.sources(node))
        return min(a.dim(), b.dim()) > 2 and a.shape[:-2] == b.shape[:-2]


class Attention(Rule):
    """Scaled dot-product attention: (batch, heads, length, features) each."""

    def forward(self, flow: Flow, node: fx.Node, out: Tensor) -> Value:
        """A feature is constant where its values are the same at all keys."""
        sources = self._sources(flow, node)
        if sources is None:
            return super().forward(flow, node, out)
        q, k, v = (flow.values[n] for n in sources)
        one_unit(flow, q.label, k.label.transpose(-1, -2), name_of(node))
        mask = argument(node, 3)
        if isinstance(mask, fx.Node) and flow.raw[mask].dim() > 2 and flow.raw[mask].shape[-3] > 1:
            flow.units.pin(q.label, f"{name_of(node)} has a mask for each head")
        if mask in flow.values:
            flow.units.pin(flow.values[mask].label, f"{name_of(node)} needs all of its mask")
        sums = _shows_keys(flow, mask) and not argument(node, 4)
        if not sums:
            hidden = weighed(v, True).expand(v.label.shape)
            flow.units.tell(
                v.label[hidden], f"{name_of(node)} has a mask that may hide all keys, where it is not constant"
            )
        return _mean(out, v, sums)

    def backward(self, flow: Flow, node: fx.Node, needed: Tensor) -> None:
        """Queries and keys of a head that is used; features of values."""
        sources = self._sources(flow, node)
        if sources is None:
            return super().backward(flow, node, needed)
        head = anywhere(needed, -1, -2)
        for source in sources[:2]:
            flow.use(source, head.expand(flow.raw[source].shape))
        flow.use(sources[2], anywhere(needed, -2).expand(flow.raw[sources[2]].shape))
        if (mask := argument(node, 3)) in flow.values:
            flow.use(mask, fill(flow.raw[mask], True))

    def follow(self, flow: Flow, node: fx.Node) -> list[Followed]:
        """Heads and their features stay where they are."""
        flow.pin_inputs(node)
        return []

    def constrain(self, plan: Plan, node: fx.Node) -> None:
        """A head stays everywhere or nowhere."""
        sources = self._sources(plan.flow, node)
        if sources is not None:
            same_heads(plan, node, sources)

    @staticmethod
    def _sources(flow: Flow, node: fx.Node) -> list[fx.Node] | None:
        sources = [argument(node, i) for i in range(3)]
        if not all(n in flow.values for n in sources):
            return None
        heads = {flow.raw[n].shape[:-2] for n in sources}
        return sources if len(heads) == 1 else None


def _mean(out: Tensor, values: Value, sums: bool) -> Value:
    """A weighed mean of values (..., keys, features), whose constants are free of the rounding of weights."""
    known = weighed(values, sums)
    exact = torch.where(known, values.tensor.narrow(-2, 0, 1), out)
    return Value(exact, known.expand(out.shape), values.label.narrow(-2, 0, 1).expand(out.shape))


def _shows_keys(flow: Flow, mask: object) -> bool:
    """Whether every query sees a key: one that sees none gives zeros. A mask must follow from sizes to be judged."""
    if not isinstance(mask, fx.Node):
        return True
    seen = flow.raw[mask] if flow.raw[mask].dtype == torch.bool else flow.raw[mask] > -torch.inf
    return mask in flow.still and bool(seen.any(-1).all())


def one_unit(flow: Flow, a: Tensor, b: Tensor, name: str) -> Tensor:
    """Make each matrix of labels a (..., n, k) and b (..., k, m) one unit; (..., 1, 1) its label."""
    head = a[..., :1, :1]
    for label in (a, b):
        flow.units.tie(label, head.expand(label.shape), f"{name} has heads of equal size")
    return head


def weighed(values: Value, sums: bool) -> Tensor:
    """(..., 1, features) whether a weighed mean of values (..., keys, features) is constant."""
    tensor = values.tensor
    same = even(tensor, -2) if sums else (tensor == 0)
    return everywhere(values.known & same, -2)


def sums_to_one(node: fx.Node) -> bool:
    """Whether the last axis of a node is the result of a softmax."""
    while getattr(node.target, "overloadpacket", None) in (aten.clone, aten._to_copy, aten.dropout):
        node = argument(node, 0)
    return getattr(node.target, "overloadpacket", None) in (aten.softmax, aten._softmax) and node.args[1] in (
        -1,
        _rank(node) - 1,
    )


def _rank(node: fx.Node) -> int:
    return len(node.meta.get("dynamic", ()))


def same_heads(plan: Plan, node: fx.Node, sources: list[fx.Node]) -> None:
    """Let a matrix stay in all of `sources` where it stays in one."""
    stays = [plan.kept(plan.flow.values[n]).any(-1).any(-1) for n in sources]
    anywhere = torch.stack(stays).any(0)
    for source, here in zip(sources, stays, strict=True):
        plan.restore(plan.flow.values[source].label[anywhere & ~here], f"{name_of(node)} needs it for its head")
