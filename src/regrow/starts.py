"""How the first topologies are made: dense, at random from shapes alone, or from scores."""

from __future__ import annotations

import torch

from regrow.drops import keep_highest
from regrow.method import Allocation, Score, Start
from regrow.topology import Topology
from regrow.weight import Weights


def dense() -> Start:
    """Every entry is active."""
    return Start(lambda weights: None)


def random_topology(density: float | None, allocate: Allocation) -> Start:
    """Uniformly random positions with exact counts, sampled in O(nnz) from shapes alone.

    Density None leaves the counts to an `explicit` allocation.

    Source: Mocanu et al. 2018, equation 1, with exact counts where the published code draws every entry by itself.
    """

    def make(weights: Weights) -> None:
        total = None if density is None else weights.total(density)
        for weight, count in zip(weights, allocate(weights, None, total), strict=True):
            if count < weight.topology.numel:
                positions = weight.generator.subset(weight.topology.numel, count)
                weight.rewire(Topology(weight.shape, torch.from_numpy(positions)))

    return Start(make, require=lambda weights: weights.require(density))


def by_score(density: float | None, score: Score, allocate: Allocation, *, needs_gradient: bool = False) -> Start:
    """The entries of highest `score` within the counts of `allocate`."""

    def make(weights: Weights) -> None:
        scores = [score(w) for w in weights]
        counts = allocate(weights, scores, None if density is None else weights.total(density))
        topologies = [keep_highest(w, s, n) for w, s, n in zip(weights, scores, counts, strict=True)]
        for weight, topology in zip(weights, topologies, strict=True):
            weight.rewire(topology)

    return Start(make, needs_gradient, lambda weights: weights.require(density))
