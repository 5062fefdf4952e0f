"""The call: a model without what is dead in it."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from regrow.compaction.edit import Edit, fold_constants
from regrow.compaction.flow import Flow
from regrow.compaction.graph import arguments, dense, require_same, run, trace
from regrow.compaction.plan import Plan
from regrow.compaction.report import Report, kept, shapes
from regrow.compaction.rules import RULES


class Compacted(fx.GraphModule):
    """A smaller model, made by `regrow.compact`; it computes what the original does in evaluation."""

    @property
    def report(self) -> Report:
        """What went, and what is dead and stays."""
        report: Report = self.meta["report"]
        return report


def compact(model: nn.Module, example: Any, *, dynamic_shapes: Any = None) -> Compacted:
    """A smaller dense model with the same outputs as `model` has in evaluation, without what is dead in it.

    A neuron, channel or attention head is dead when its value does not depend on the model's inputs, or when no output
    depends on it: because its weights are zero, on either side. Removing it may let others die; all of them go. What
    a dead unit adds that is constant goes into the next bias, where that is exact. Residual additions, norms and
    concatenations tie units of several layers, which go if all are dead.

    The result is a graph of torch's own operators with the parameters' former names, in evaluation for good: dropout is
    gone, batch norms keep their statistics. It is called as `model` is, has gradients, and goes through torch.export
    and torch.onnx. `model` is left as it is; its compressed modules are read as dense ones.

    Args:
        model: any model that torch.export can trace.
        example: an input of the model, with a batch of 2 or more if the batch may vary: a tensor, or a tuple or dict of
            the model's arguments. Its other sizes are those that the result takes.
        dynamic_shapes: which sizes may vary, as torch.export takes it; None is the first axis of every tensor.

    Returns:
        The model; its `report` has the sizes before and after, and lists what is dead and had to stay, with reasons.

    Raises:
        ValueError: when the model cannot be traced, or an operator in it does not do what it declares, so that the
            outputs would change.

    Examples:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> with torch.no_grad():
        ...     _ = model[0].weight[:5].zero_()
        >>> small, x = compact(model, torch.randn(2, 4)), torch.randn(5, 4)
        >>> print(small.report)
        parameter  before  after
        0.weight    8 x 4  3 x 4
        0.bias          8      3
        2.weight    3 x 8  3 x 3
        entries        67     27
        >>> torch.allclose(small(x), model(x), atol=1e-6)
        True

    Source: Han et al., "Learning both Weights and Connections for Efficient Neural Networks" (NIPS 2015), section 3.5,
    which removes neurons without inputs or outputs. There training makes their biases vanish; here what they add stays.
    """
    given = arguments(example)
    with dense(model) as whole:
        expected = run(whole, given)
        before = shapes(whole)
        module = trace(whole, given, dynamic_shapes, by="compact")
    with next((p.device for p in model.parameters()), torch.device("cpu")):
        plan = _shrink(module, pytree.tree_leaves(given))
    small = Compacted(module, module.graph)
    small.meta["report"] = Report(
        before, shapes(small), kept(plan, lambda node: RULES.of(node).origin(plan.flow, node))
    )
    require_same("compact", expected, run(small, given))
    return small


def _shrink(module: fx.GraphModule, inputs: list[Any]) -> Plan:
    """Cut the graph until nothing can go; the last plan says what is dead and stays."""
    while True:
        flow = Flow(module, inputs, RULES.of)
        if fold_constants(flow, lambda node: RULES.of(node) is RULES.pointwise):
            continue
        plan = Plan(flow, lambda plan, node: RULES.of(node).constrain(plan, node))
        if not plan.gone.any():
            return plan
        Edit(flow, plan).run(lambda edit, node: RULES.of(node).rewrite(edit, node))
