"""A sparse network as a value: what is active, with which values, and all else that its model's state holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from regrow.core.names import canonical_names
from regrow.core.topology import Topology
from regrow.core.weight import SparseWeight
from regrow.engine.sparsifier import Sparsifier
from regrow.nn import SparseModule
from regrow.nn.base import PERSISTENT
from regrow.parts.observers import mark_explored

VERSION = 1


@dataclass(frozen=True, eq=False)
class Ticket:
    """One sparse network, apart from any model: it can be kept, averaged, and installed where its shapes fit.

    Args:
        topologies: of each sparsified weight, by canonical name.
        values: (nnz,) active values of each, by canonical name.
        others: the other tensors of the model's state dict: biases, norms, buffers; tied ones once.
        axes: (out_axis, in_axis) of each sparsified weight.
        outside: entries that count in the budget without being sparsified, and how many of these are active.

    Examples:
        >>> import regrow
        >>> model = nn.Linear(20, 10)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> sparsifier = regrow.sparsify(model, optimizer, regrow.methods.static(density=0.1))
        >>> ticket = Ticket.of(sparsifier)
        >>> ticket.nnz, list(ticket.values), list(ticket.others)
        (20, ['weight'], ['bias'])
        >>> with torch.no_grad():
        ...     _ = model.weight.zero_()
        >>> ticket.install(sparsifier)
        >>> int((model.weight != 0).sum())
        20
    """

    topologies: Mapping[str, Topology]
    values: Mapping[str, Tensor]
    others: Mapping[str, Tensor]
    axes: Mapping[str, tuple[int, int]]
    outside: tuple[int, int] = (0, 0)

    @classmethod
    def of(cls, sparsifier: Sparsifier) -> Ticket:
        """The network as it is now, in memory of its own."""
        weights = sparsifier.weights
        return cls(
            dict(sparsifier.topologies),
            {w.name: w.values().detach().clone() for w in weights},
            {name: tensor.clone() for name, tensor in others_of(sparsifier).items()},
            {w.name: (w.out_axis, w.in_axis) for w in weights},
            (weights.outside_numel, weights.outside_nnz),
        )

    @property
    def nnz(self) -> int:
        """Active entries."""
        return sum(t.nnz for t in self.topologies.values())

    @property
    def numel(self) -> int:
        """Entries of the sparsified weights, active or not."""
        return sum(t.numel for t in self.topologies.values())

    @property
    def density(self) -> float:
        """nnz / numel."""
        return self.nnz / self.numel

    def install(self, sparsifier: Sparsifier) -> None:
        """Make this the sparsifier's network, in the same parameter objects; training goes on from it.

        Entries that stay active keep their optimizer state, the others have none. Step counts stay as they are.

        Raises:
            ValueError: when names or shapes differ, the first topologies are still to be made, weights are computed
                from latent values, or compressed storage lacks room; nothing is changed then.
        """
        self.require_fit(sparsifier)
        with torch.no_grad():
            rewire(sparsifier, self.topologies)
            self._write(sparsifier)

    def require_fit(self, sparsifier: Sparsifier) -> None:
        """Raise ValueError when this cannot be installed."""
        require_topologies("ticket", sparsifier, self.topologies)
        ours = {name: tuple(t.shape) for name, t in self.others.items()}
        theirs = {name: tuple(t.shape) for name, t in others_of(sparsifier).items()}
        if ours != theirs:
            differing = sorted({name for name, _ in ours.items() ^ theirs.items()})
            raise ValueError(
                f"ticket: it is of another model, {len(differing)} of whose {len(theirs)} dense tensors differ in name "
                f"or shape ({', '.join(differing[:3])}): install it where it was taken, or in a copy of that model"
            )

    def _write(self, sparsifier: Sparsifier) -> None:
        """Write all values; the topologies are in place."""
        for weight in sparsifier.weights:
            weight.set_values(self.values[weight.name])
        for name, tensor in others_of(sparsifier).items():
            tensor.copy_(self.others[name])

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values only, for `torch.save` and `torch.load(weights_only=True)`."""
        return {
            "version": VERSION,
            "shapes": {name: list(t.shape) for name, t in self.topologies.items()},
            "units": {name: list(t.unit) for name, t in self.topologies.items() if not t.is_unstructured},
            "positions": {name: t.positions for name, t in self.topologies.items()},
            "values": dict(self.values),
            "others": dict(self.others),
            "axes": {name: list(axes) for name, axes in self.axes.items()},
            "outside": list(self.outside),
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Ticket:
        """The ticket whose `state_dict` this is.

        Raises:
            ValueError: when it is none, or its values and positions disagree.
        """
        require_version("ticket", state)
        shapes = {name: tuple(shape) for name, shape in state["shapes"].items()}
        units = {name: tuple(unit) for name, unit in state.get("units", {}).items()}
        topologies = {n: Topology(shape, state["positions"][n], units.get(n)) for n, shape in shapes.items()}
        for name, topology in topologies.items():
            if state["values"][name].shape != (topology.nnz,):
                raise ValueError(
                    f"ticket: {name} has {topology.nnz:,} positions and values of shape "
                    f"{tuple(state['values'][name].shape)}: the state is damaged, save it anew"
                )
        axes = {name: (int(pair[0]), int(pair[1])) for name, pair in state["axes"].items()}
        outside = int(state["outside"][0]), int(state["outside"][1])
        return cls(topologies, dict(state["values"]), dict(state["others"]), axes, outside)


@contextmanager
def installed(sparsifier: Sparsifier, ticket: Ticket) -> Iterator[None]:
    """Within, the ticket is in the model, for evaluation; afterwards all is as before, to the bit.

    Optimizer state and gradients are never touched, and a step within is refused: `Ticket.install` is for training.

    Raises:
        ValueError: as `Ticket.install`.
        RuntimeError: when an optimizer of the sparsifier is asked to step within.
    """
    ticket.require_fit(sparsifier)
    groups = parameters_of(sparsifier)
    raw = [parameter.detach().clone() for parameter, _ in groups]
    topologies = sparsifier.topologies
    others = {name: tensor.clone() for name, tensor in others_of(sparsifier).items()}

    def refuse(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if any(optimizer is own for own in sparsifier.optimizers):
            raise RuntimeError(
                "ticket: an optimizer steps within installed(), whose changes would be lost: use ticket.install to "
                "train on"
            )

    handle = register_optimizer_step_pre_hook(refuse)
    try:
        with torch.no_grad():
            _swap(sparsifier, ticket.topologies)
            for parameter, _ in groups:
                parameter.zero_()
            ticket._write(sparsifier)
        yield
    finally:
        handle.remove()
        with torch.no_grad():
            _swap(sparsifier, topologies)
            for (parameter, _), values in zip(groups, raw, strict=True):
                parameter.copy_(values)
            for name, tensor in others_of(sparsifier).items():
                tensor.copy_(others[name])


def _swap(sparsifier: Sparsifier, topologies: Mapping[str, Topology]) -> None:
    """Take on topologies without a look at values or optimizer state."""
    for weight in _shrinking_first(sparsifier, topologies):
        weight.restore(topologies[weight.name])


def rewire(sparsifier: Sparsifier, topologies: Mapping[str, Topology]) -> None:
    """Give each weight its topology: survivors keep value and optimizer state, newcomers start at zero."""
    for weight in _shrinking_first(sparsifier, topologies):
        before = weight.topology
        weight.rewire(topologies[weight.name])
        if "explored" in weight.state:
            mark_explored(weight, before)


def _shrinking_first(sparsifier: Sparsifier, topologies: Mapping[str, Topology]) -> list[SparseWeight]:
    """In this order, blocks of one parameter never need more room than they had before or have afterwards."""
    return sorted(sparsifier.weights, key=lambda w: topologies[w.name].nnz - w.topology.nnz)


def others_of(sparsifier: Sparsifier) -> dict[str, Tensor]:
    """What the model's state dict holds beside sparsified weights, live, by canonical name; tied tensors once."""
    model = sparsifier.model
    state = {name: t for name, t in model.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
    names, hidden = canonical_names(state), topology_entries(model)
    found, seen = {}, set(sparsifier.names)
    for name, tensor in state.items():
        if name not in hidden and id(tensor) not in seen:
            found[names[name]] = tensor.detach()
        seen.add(id(tensor))
    return found


def topology_entries(model: nn.Module) -> set[str]:
    """The keys of the state dict that say where the values of compressed weights belong."""
    return {
        f"{path}.{own}_{field}".removeprefix(".")
        for path, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, SparseModule)
        for own in module.shapes
        for field in PERSISTENT
    }


def parameters_of(sparsifier: Sparsifier) -> list[tuple[nn.Parameter, list[SparseWeight]]]:
    """Each sparsified parameter with its one or several weights."""
    first = {sparsifier.names[id(p)]: p for p in sparsifier.model.parameters() if id(p) in sparsifier.names}
    groups: list[tuple[nn.Parameter, list[SparseWeight]]] = []
    for weight in sparsifier.weights:
        if weight.name in first:
            groups.append((first[weight.name], []))
        groups[-1][1].append(weight)
    return groups


def require_topologies(method: str, sparsifier: Sparsifier, topologies: Mapping[str, Topology]) -> None:
    """Raise ValueError when the weights cannot take on these topologies."""
    if not sparsifier.started:
        raise ValueError(
            f"{method}: {sparsifier.method.name} makes its first topologies in its first step, which would undo any "
            "others: take that step first"
        )
    if sparsifier.method.latent is not None:
        raise ValueError(
            f"{method}: {sparsifier.method.name} computes its weights from latent values, which no ticket holds: call "
            "sparsifier.harden() first, or restore a Snapshot"
        )
    ours = {name: (t.shape, t.unit) for name, t in topologies.items()}
    theirs = {w.name: (w.shape, w.topology.unit) for w in sparsifier.weights}
    if ours != theirs:
        differing = sorted({name for name, _ in ours.items() ^ theirs.items()})
        raise ValueError(
            f"{method}: {len(differing)} of the {len(theirs)} sparsified weights differ in name, shape or units "
            f"({', '.join(differing[:3])}): give one topology for each weight of the same model"
        )
    for parameter, weights in parameters_of(sparsifier):
        nnz = sum(topologies[w.name].nnz for w in weights)
        if nnz > parameter.numel():
            raise ValueError(
                f"{method}: {_label(weights)} would have {nnz:,} active entries, and its compressed storage has room "
                f'for {parameter.numel():,}: keep the count of each layer (layer_preserving), or use storage="masked"'
            )


def _label(weights: Sequence[SparseWeight]) -> str:
    return weights[0].name if len(weights) == 1 else weights[0].name.rpartition("[")[0]


def require_version(method: str, state: Mapping[str, Any]) -> None:
    """Raise ValueError when `state` is not a state dict of this version."""
    if state.get("version") != VERSION:
        raise ValueError(f"{method}: this state has version {state.get('version')}, and this regrow reads {VERSION}")
