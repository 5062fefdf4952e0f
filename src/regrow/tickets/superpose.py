"""Many tickets superposed into one: the mean of sparse networks, pruned back to the density of each.

Source: Yin et al. 2022, Superposing Many Tickets into One: A Performance Booster for Sparse Neural Network Training,
section 3.3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor

from regrow.core.checks import require_choice, require_density
from regrow.core.method import Allocation
from regrow.core.selection import is_finite
from regrow.core.topology import Topology
from regrow.core.units import mean
from regrow.core.weight import Sized, SparseWeight, Weights
from regrow.engine.sparsifier import Sparsifier
from regrow.parts.allocation import globally
from regrow.tickets.ticket import VERSION, Ticket, installed, require_version

Average = Literal["caa", "cima"]
"""How tickets are averaged: all alike, or with the newest given a constant weight."""


@dataclass(frozen=True)
class _Mean:
    """The mean of one weight, as allocations see it."""

    name: str
    topology: Topology
    out_axis: int
    in_axis: int
    values: Tensor
    """(nnz,) float64."""
    newest: int
    """Active units of the newest ticket."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.topology.shape


def layer_preserving(weights: Sequence[Sized], scores: Sequence[Tensor] | None, total: int | None) -> list[int]:
    """Each weight's count in the newest ticket: an allocation for `Superposition.ticket`.

    Raises:
        ValueError: for weights of anything else, or another total than the newest ticket's.
    """
    counts = [w.newest for w in weights if isinstance(w, _Mean)]
    if len(counts) < len(weights):
        raise ValueError("layer_preserving shares out superposed tickets only: give it to Superposition.ticket")
    held = sum(n * w.topology.unit_size for n, w in zip(counts, weights, strict=True))
    if total is not None and total != held:
        raise ValueError(
            f"layer_preserving keeps the {held:,} active entries of the newest ticket, and the density asks for "
            f"{total:,}: leave the density out, or allocate globally"
        )
    return counts


class Superposition:
    """A mean of tickets, in float64 over the union of their topologies, never pruned in between.

    Each ticket T moves the mean W to W + r (T - W); entries that are not active count as zero. Biases, norms and
    floating buffers are averaged alike; buffers of integers are those of the newest ticket.

    Args:
        average: "caa": r = 1 / k for the k-th ticket, which makes W the arithmetic mean of all. "cima": r = `factor`
            from the second on, a moving average.
        factor: weight of the newest ticket in the moving average, in (0, 1]; for "cima" only.

    Raises:
        ValueError: for a factor that is missing, out of range, or of no use.

    Source: Yin et al. 2022, equations 3 and 4. The published code prunes the mean after each ticket, so that what was
    cut once is lost to it, and averages counters as if they were weights.

    Examples:
        >>> values = {"w": torch.tensor([1.0, 3.0])}
        >>> tickets = [
        ...     Ticket({"w": Topology((1, 4), torch.tensor(at))}, values, {}, {"w": (0, 1)}) for at in ([0, 1], [1, 2])
        ... ]
        >>> mean = Superposition("caa")
        >>> for ticket in tickets:
        ...     mean.add(ticket)
        >>> mean.ticket().values["w"], mean.ticket(density=0.5).topologies["w"].positions
        (tensor([0.5000, 2.0000, 1.5000]), tensor([1, 2]))
    """

    def __init__(self, average: Average = "caa", factor: float | None = None) -> None:
        require_choice("superposition", "average", average, ("caa", "cima"))
        if average == "caa" and factor is not None:
            raise ValueError(f"superposition: caa weighs all tickets alike, so leave out the factor {factor:g}")
        if average == "cima" and (factor is None or not 0 < factor <= 1):
            raise ValueError(
                f"superposition: cima needs the weight of the newest ticket as factor, in (0, 1], got {factor}"
            )
        self.average: Average = average
        self.factor = factor
        self.count = 0
        """Tickets so far."""
        self._newest: Ticket | None = None
        self._topologies: dict[str, Topology] = {}
        self._values: dict[str, Tensor] = {}
        self._others: dict[str, Tensor] = {}

    def add(self, ticket: Ticket) -> None:
        """Take a ticket into the mean, in O(its nnz + that of the mean).

        Raises:
            ValueError: when it is of another model than those before, or not finite; the mean is then unchanged.
        """
        _require_finite(ticket)
        if self._newest is not None:
            _require_same(self._newest, ticket)
        rate = 1.0 if self._newest is None or self.factor is None else self.factor
        rate = 1 / (self.count + 1) if self.average == "caa" else rate
        topologies, values = dict(self._topologies), dict(self._values)
        for name, topology in ticket.topologies.items():
            topologies[name], values[name] = _moved(
                self._topologies.get(name, topology),
                self._values.get(name, _wide(ticket.values[name])),
                topology,
                _wide(ticket.values[name]),
                rate,
            )
        others = {}
        for name, tensor in ticket.others.items():
            new = _wide(tensor)
            old = self._others.get(name, new)
            others[name] = old + rate * (new.to(old.device) - old) if _averaged(tensor) else tensor
        self._topologies, self._values, self._others = topologies, values, others
        self._newest = ticket
        self.count += 1

    def ticket(self, density: float | None = None, allocate: Allocation | None = None) -> Ticket:
        """The mean as a ticket of the newest one's dtypes, pruned back to its largest |w|.

        Args:
            density: share of active entries that is left, counted as for the run's own density; None means as many as
                the newest ticket has if there is an `allocate`, else no pruning at all.
            allocate: how they are shared among the weights: `globally` (the default with a density) takes the largest
                anywhere, `layer_preserving` leaves each weight the count of the newest ticket.

        Raises:
            ValueError: without a ticket, or when there are fewer entries than asked for.
        """
        if self._newest is None:
            raise ValueError("superposition: no ticket was added yet: add at least one")
        topologies, values = self._topologies, self._values
        if density is not None or allocate is not None:
            topologies, values = self._pruned(self._newest, density, allocate or globally)
        newest = self._newest
        return Ticket(
            dict(topologies),
            {name: value.to(newest.values[name].dtype, copy=True) for name, value in values.items()},
            {name: value.to(newest.others[name].dtype, copy=True) for name, value in self._others.items()},
            newest.axes,
            newest.outside,
        )

    def _pruned(
        self, newest: Ticket, density: float | None, allocate: Allocation
    ) -> tuple[dict[str, Topology], dict[str, Tensor]]:
        means = [
            _Mean(name, at, *newest.axes[name], self._values[name], newest.topologies[name].active)
            for name, at in self._topologies.items()
        ]
        total, nnz = newest.nnz, sum(m.topology.nnz for m in means)
        if density is not None:
            require_density("superposition", density)
            weights = Weights(cast(tuple[SparseWeight, ...], tuple(means)), *newest.outside)
            weights.require(density)
            total = weights.total(density)
        if total > nnz:
            raise ValueError(
                f"superposition: density {density:g} makes {total:,} active entries, and the {self.count} tickets have "
                f"{nnz:,} together: leave the density out, or ask for less"
            )
        scores = [m.topology.pooled(m.values.abs(), mean) for m in means]
        counts = allocate(means, scores, total)
        kept = {m.name: m.topology.keep(s, n) for m, s, n in zip(means, scores, counts, strict=True)}
        return kept, {m.name: m.values[kept[m.name].entry_ranks_in(m.topology).long()] for m in means}

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values only."""
        return {
            "version": VERSION,
            "average": self.average,
            "factor": self.factor,
            "count": self.count,
            "newest": None if self._newest is None else self._newest.state_dict(),
            "positions": {name: t.positions for name, t in self._topologies.items()},
            "values": dict(self._values),
            "others": dict(self._others),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`.

        Raises:
            ValueError: when it is of another version or another average; nothing is changed then.
        """
        require_version("superposition", state)
        theirs, ours = (state["average"], state["factor"]), (self.average, self.factor)
        if theirs != ours:
            raise ValueError(
                f"superposition: the state is of average {theirs[0]} with factor {theirs[1]}, and this is {ours[0]} "
                f"with factor {ours[1]}: make it alike"
            )
        newest = None if state["newest"] is None else Ticket.from_state_dict(state["newest"])
        like = {} if newest is None else newest.topologies
        self._topologies = {name: t.at(state["positions"][name]) for name, t in like.items()}
        self._values, self._others = dict(state["values"]), dict(state["others"])
        self._newest, self.count = newest, int(state["count"])


def _moved(before: Topology, mean: Tensor, topology: Topology, values: Tensor, rate: float) -> tuple[Topology, Tensor]:
    """The mean moved by `rate` towards new values, over the union of both topologies."""
    union = before.add(topology.without(before).to(mean.device))
    old, new = mean.new_zeros(union.nnz), mean.new_zeros(union.nnz)
    old[before.entry_ranks_in(union).long().to(mean.device)] = mean
    new[topology.entry_ranks_in(union).long().to(mean.device)] = values.to(mean.device)
    return union, old + rate * (new - old)


def _averaged(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _wide(tensor: Tensor) -> Tensor:
    """In double precision; integers as they are."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float64)) if _averaged(tensor) else tensor


def _require_finite(ticket: Ticket) -> None:
    for name, tensor in (*ticket.values.items(), *ticket.others.items()):
        if _averaged(tensor) and not is_finite(tensor):
            bad = int((~tensor.isfinite()).sum())
            raise ValueError(
                f"superposition: {bad:,} of {tensor.numel():,} entries of {name} are not finite, since training has "
                "diverged: lower the learning rate"
            )


def _require_same(one: Ticket, other: Ticket) -> None:
    shapes = [
        {n: (t.shape, t.unit) for n, t in t.topologies.items()} | {n: tuple(t.shape) for n, t in t.others.items()}
        for t in (one, other)
    ]
    if shapes[0] != shapes[1]:
        differing = sorted({name for name, _ in shapes[0].items() ^ shapes[1].items()})
        raise ValueError(
            f"superposition: {len(differing)} tensors of the ticket differ in name, shape or units from those before "
            f"({', '.join(differing[:3])}): superpose tickets of one model"
        )


def ensemble(sparsifier: Sparsifier, tickets: Sequence[Ticket], predict: Callable[[], Tensor]) -> Tensor:
    """The mean of what `predict()` returns with each ticket in the model; everything is restored afterwards.

    Args:
        sparsifier: whose model `predict` reads.
        tickets: at least one.
        predict: returns a tensor, commonly probabilities (n, classes), of one shape for all tickets.

    Raises:
        ValueError: without tickets, or as `Ticket.install`.
    """
    if not tickets:
        raise ValueError("ensemble: there is no ticket to predict with: give at least one")
    total: Tensor | None = None
    for ticket in tickets:
        with installed(sparsifier, ticket), torch.no_grad():
            found = predict()
        if not _averaged(found):
            raise ValueError(
                f"ensemble: predict returned {found.dtype}, of which there is no mean: return probabilities"
            )
        total = _wide(found) if total is None else total + _wide(found)
    assert total is not None
    return (total / len(tickets)).to(found.dtype)
