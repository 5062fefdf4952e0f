"""What topologies look like: exact densities, how much was explored, how far two lie apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from regrow.core.topology import Topology
from regrow.engine.sparsifier import Sparsifier
from regrow.parts.observers import explored_entries
from regrow.parts.remembered import EXPLORED, PLACED


def densities(sparsifier: Sparsifier) -> dict[str, float]:
    """nnz / numel of every sparsified weight by name, from exact counts."""
    return {name: topology.density for name, topology in sparsifier.topologies.items()}


class Exploration(NamedTuple):
    """The in-time over-parameterization rate R_s, overall and for each weight by name."""

    overall: float
    layers: dict[str, float]
    bound: float
    """What `overall` would be if every entry that became active had done so where none had been before; at most 1."""
    bounds: dict[str, float]
    """The same of each weight by name."""


def exploration(sparsifier: Sparsifier) -> Exploration:
    """R_s: entries that were ever active / all entries of the sparsified weights, with what it can be at most.

    An update that grows k_l entries in weight l of N entries in all raises R_s by at most sum(k_l) / N.

    Raises:
        ValueError: when the method was not asked to keep track: give it `Need.EXPLORED`.

    Source: Liu et al. 2021, Do We Actually Need Dense Over-Parameterization?, section 3.2.
    """
    overall = sparsifier.explored
    if overall is None or not all(EXPLORED.known(w) for w in sparsifier.weights):
        raise ValueError(
            f"{sparsifier.method.name} keeps no explored positions: use method._replace(needs=method.needs | "
            "Need.EXPLORED) and start it"
        )
    numel = {w.name: max(1, w.topology.numel) for w in sparsifier.weights}
    placed = {w.name: int(PLACED.of(w)) * w.topology.unit_size for w in sparsifier.weights}
    placed = {name: min(n, numel[name]) for name, n in placed.items()}
    return Exploration(
        overall,
        {w.name: explored_entries(w) / numel[w.name] for w in sparsifier.weights},
        sum(placed.values()) / max(1, sparsifier.numel),
        {name: placed[name] / n for name, n in numel.items()},
    )


def distance(a: Mapping[str, Topology], b: Mapping[str, Topology]) -> float:
    """Jaccard distance 1 - |A and B| / |A or B| of the active entries of all weights: 0 equal, 1 disjoint.

    Raises:
        ValueError: when the two do not have the same weights, shapes and units.

    Examples:
        >>> import torch
        >>> a, b = Topology((4,), torch.tensor([0, 1])), Topology((4,), torch.tensor([1, 2]))
        >>> round(distance({"w": a}, {"w": b}), 4)
        0.6667
    """
    if {n: (t.shape, t.unit) for n, t in a.items()} != {n: (t.shape, t.unit) for n, t in b.items()}:
        raise ValueError(f"topologies of different models have no distance: {', '.join(a)} against {', '.join(b)}")
    common = sum(t.nnz - t.without(b[name]).numel() * t.unit_size for name, t in a.items())
    union = sum(t.nnz + b[name].nnz for name, t in a.items()) - common
    return 1 - common / union if union else 0.0
