"""The call: hidden neurons and channels in another order, in which alike ones stand side by side."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from regrow.compaction.flow import Flow, Followed, name_of
from regrow.compaction.graph import arguments, require_same, run, trace
from regrow.compaction.rules import RULES
from regrow.core.text import by
from regrow.core.topology import Topology
from regrow.core.weight import Shaped
from regrow.engine import claims
from regrow.nn import SparseModule
from regrow.parts import groups
from regrow.storage.state import forget_history, weight_shaped_state


class _Axis(NamedTuple):
    """An axis of a parameter or buffer."""

    name: str
    axis: int


class _Class(NamedTuple):
    """Neurons that may change places with one another."""

    places: Mapping[_Axis, Tensor]
    """Where each stands along an axis, (neurons, times that it stands there)."""
    outputs: Sequence[_Axis]
    """The weights whose outputs they are, with their output axes."""


def order_outputs(
    model: nn.Module,
    example: Any,
    size: int = 8,
    *,
    scores: Mapping[str, Tensor] | None = None,
    optimizer: Optimizer | Sequence[Optimizer] = (),
    dynamic_shapes: Any = None,
) -> dict[str, Tensor]:
    """Put hidden neurons and channels that are alike side by side, where `groups(size)` lets them share inputs.

    Hidden neurons have no order: where one moves, everything that reads it moves along, and the model's outputs stay as
    they are. Two neurons are alike when they weigh the same inputs: s(i, j) = cos(|w_i|, |w_j|), over the rows of all
    weights whose output they are. Groups are filled greedily: each begins with the longest row that is left, and takes
    in turn the neuron with the largest sum of s to those that it has.

    Call it on a dense model, trained or trained for a while, before `regrow.sparsify`. What moves together is read from
    the model's graph, as `regrow.compact` reads it. Channels that a residual addition ties move together. Inputs and
    outputs of the model, features that a layer norm or a softmax runs over, heads of attention, channels of grouped
    convolutions and gates of recurrent layers stay where they are; depthwise convolutions move along.

    Args:
        model: any dense model that torch.export can trace; its parameters and buffers are permuted in place.
        example: an input, as `regrow.compact` takes it.
        size: outputs of a group, as `groups` takes it.
        scores: what is compared in place of |w|, by the name of a weight, of its shape: `{"0.weight": (w * g).abs()}`
            groups by SNIP's saliency.
        optimizer: one or several, whose state of the permuted parameters moves along.
        dynamic_shapes: as for `regrow.compact`.

    Returns:
        For each weight whose outputs moved, (outputs,) int64: which former output stands at each place.

    Raises:
        ValueError: when the model is sparsified already or cannot be traced, when none of its neurons may move, when a
            score is of no weight or has another shape, or when an operator does not do what it declares, so that the
            outputs would change; the model is then as it was.

    Examples:
        >>> model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 3))
        >>> x = torch.randn(5, 20)
        >>> y = model(x)
        >>> moved = order_outputs(model, x, 8)
        >>> sorted(moved), sorted(moved["0.weight"].tolist()) == list(range(64))
        (['0.weight'], True)
        >>> torch.allclose(model(x), y, atol=1e-6)
        True

    Source: Pool and Yu 2021, Channel Permutations for N:M Sparsity, permute what a layer reads and carry that through
    the network; Ji et al. 2018, TETRIS, do so for blocks. They search for the order that keeps most of the magnitude
    after pruning; here outputs are grouped by likeness, once, and training goes on.
    """
    optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
    _require_dense(model, optimizers)
    given = arguments(example)
    expected = run(model, given)
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    graph = trace(model, given, dynamic_shapes, by="order_outputs")
    with next((p.device for p in model.parameters()), torch.device("cpu")):
        flow = Flow(graph, pytree.tree_leaves(given), RULES.of)
    classes = _classes(flow, tensors)
    orders = _orders(classes, size, _compared(tensors, scores))
    if not orders:
        raise ValueError(
            f"order_outputs: none of {len(tensors)} parameters and buffers has outputs that may change places: it "
            "takes hidden neurons or channels that no attention, norm over features or group of channels holds"
        )
    try:
        for axis, order in orders.items():
            _permute(tensors[axis.name], axis.axis, order, optimizers)
        require_same("order_outputs", expected, run(model, given))
    except ValueError:
        for axis, order in orders.items():
            _permute(tensors[axis.name], axis.axis, order.argsort(), optimizers)
        raise
    return {axis.name: orders[axis] for neurons in classes for axis in neurons.outputs}


def _require_dense(model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
    claims.require_free({id(p): name for name, p in model.named_parameters()}, optimizers)
    sparse = [name for name, module in model.named_modules() if isinstance(module, SparseModule)]
    if sparse:
        raise ValueError(
            f"order_outputs: {len(sparse)} modules are sparse already ({', '.join(sparse[:3])}): order the outputs of "
            "the dense model, before it is sparsified"
        )


def _compared(tensors: Mapping[str, Tensor], scores: Mapping[str, Tensor] | None) -> Mapping[str, Tensor]:
    """What rows are compared by: the scores, and magnitudes where there is none."""
    for name, score in (scores or {}).items():
        if name not in tensors or score.shape != tensors[name].shape:
            known = f"of shape {by(tensors[name].shape)}" if name in tensors else "not there"
            raise ValueError(f"order_outputs: a score is of {name}, of shape {by(score.shape)}, which is {known}")
    return {**tensors, **(scores or {})}


def _follows(flow: Flow, tensors: Mapping[str, Tensor]) -> dict[_Axis, Followed]:
    """What each axis of each parameter goes with. One that is read in a way that is not known is pinned."""
    found: dict[_Axis, list[Followed]] = defaultdict(list)
    read: set[tuple[fx.Node, fx.Node]] = set()
    for node in flow.values:
        follows = flow.rule(node).follow(flow, node) if node.op == "call_function" else None
        for f in follows or ():
            if f.leaf.op == "get_attr" and f.leaf.target in tensors:
                found[_Axis(str(f.leaf.target), f.axis)].append(f)
            else:
                flow.units.pin(f.label, f"{name_of(node)} reads what is computed from parameters")
        if follows is not None:
            read |= {(leaf, node) for leaf in node.all_input_nodes}
    unknown = {leaf.target for leaf in flow.leaves for user in leaf.users if (leaf, user) not in read}
    for axis, follows in found.items():
        for f in follows:
            flow.units.tie(follows[0].label, f.label)
            if axis.name in unknown:
                flow.units.pin(f.label, f"{axis.name} is read in other ways too")
    return {axis: max(follows, key=lambda f: f.is_output) for axis, follows in found.items()}


def _classes(flow: Flow, tensors: Mapping[str, Tensor]) -> list[_Class]:
    """Neurons that stand equally often along the same axes, and that nothing holds."""
    follows = _follows(flow, tensors)
    stays = flow.units.stays()
    found: dict[int, dict[_Axis, list[int]]] = defaultdict(lambda: defaultdict(list))
    for axis, f in follows.items():
        for index, root in enumerate(flow.units.find(f.label).tolist()):
            if not stays[root]:
                found[root][axis].append(index)
    alike: dict[Any, list[dict[_Axis, list[int]]]] = defaultdict(list)
    for where in found.values():
        alike[frozenset((axis, len(at)) for axis, at in where.items())].append(where)
    classes = []
    for members in alike.values():
        outputs = [axis for axis, at in members[0].items() if follows[axis].is_output and len(at) == 1]
        if outputs:
            members.sort(key=lambda where: where[outputs[0]])
            places = {axis: torch.tensor([m[axis] for m in members]) for axis in members[0]}
            classes.append(_Class(places, outputs))
    return classes


def _orders(classes: Sequence[_Class], size: int, compared: Mapping[str, Tensor]) -> dict[_Axis, Tensor]:
    """Which former index stands at each index of every axis that changes, (size of the axis,)."""
    orders: dict[_Axis, Tensor] = {}
    for neurons in classes:
        name, axis = neurons.outputs[0]
        shape = compared[name].shape
        whole = Shaped(name, tuple(shape), Topology(tuple(shape)), axis, 1 - axis)
        order = side_by_side(_rows(neurons, compared), groups(size).box(whole)[axis])
        for at, places in neurons.places.items():
            all_of_it = orders.setdefault(at, torch.arange(compared[at.name].shape[at.axis]))
            all_of_it[places] = places[order]
    return orders


def _rows(neurons: _Class, compared: Mapping[str, Tensor]) -> Tensor:
    """What each neuron makes of its inputs, in magnitude, (neurons, inputs of all weights) float32."""
    return torch.cat(
        [
            compared[at.name].detach().cpu().float().abs().movedim(at.axis, 0)[neurons.places[at].view(-1)].flatten(1)
            for at in neurons.outputs
        ],
        1,
    )


def side_by_side(rows: Tensor, size: int) -> Tensor:
    """The order of rows (n, d) in which those of each `size` consecutive ones have large cosines, (n,) int64.

    Examples:
        >>> side_by_side(torch.tensor([[1.0, 0.0], [0.0, 3.0], [2.0, 0.0], [0.0, 1.0]]), 2).tolist()
        [1, 3, 2, 0]
    """
    lengths = rows.norm(dim=1)
    unit = rows / lengths.clamp(min=torch.finfo(rows.dtype).tiny)[:, None]
    alike = unit @ unit.t()
    free = torch.ones(len(rows), dtype=torch.bool)
    order: list[int] = []
    while len(order) < len(rows):
        if len(order) % size == 0:
            total, rank = torch.zeros(len(rows)), lengths
        chosen = int(rank.masked_fill(~free, -torch.inf).argmax())
        free[chosen] = False
        order.append(chosen)
        rank = total = total + alike[chosen]
    return torch.tensor(order, dtype=torch.int64)


@torch.no_grad()
def _permute(tensor: Tensor, axis: int, order: Tensor, optimizers: Sequence[Optimizer]) -> None:
    """Put what stood at `order` (size,) along an axis in its new place, gradient and state of optimizers too."""
    beside = [] if tensor.grad is None else [tensor.grad]
    for optimizer in optimizers:
        if isinstance(tensor, nn.Parameter):
            beside += _moved_state(optimizer, tensor)
    for each in (tensor, *beside):
        each.copy_(each.index_select(axis, order.to(each.device)))


def _moved_state(optimizer: Optimizer, parameter: nn.Parameter) -> list[Tensor]:
    """The state that moves with entries; where there is more, which is written in the old order, all of it goes."""
    forget_history(optimizer)
    own = weight_shaped_state(optimizer, parameter)
    state = optimizer.state.get(parameter, {})
    if any(torch.is_tensor(s) and s.dim() for key, s in state.items() if key not in own):
        del optimizer.state[parameter]
        return []
    return list(own.values())
