"""How the first topologies are made: dense, at random from shapes alone, or from scores."""

from __future__ import annotations

import torch

from regrow.method import Allocation, Probe, Score, Start, Structure
from regrow.nn import fan_in_scale
from regrow.topology import Topology
from regrow.updates import prune_to
from regrow.weight import Weights


def dense() -> Start:
    """Every entry is active."""
    return Start(lambda weights, probe: None)


def random_topology(density: float | None, allocate: Allocation) -> Start:
    """Uniformly random positions with exact counts, sampled in O(nnz) from shapes alone.

    Density None leaves the counts to an `explicit` allocation.

    Source: Mocanu et al. 2018, equation 1, with exact counts where the published code draws every entry by itself.
    """

    def make(weights: Weights, probe: Probe) -> None:
        total = None if density is None else weights.total(density)
        for weight, count in zip(weights, allocate(weights, None, total), strict=True):
            if count < weight.topology.numel:
                positions = weight.generator.subset(weight.topology.numel, count)
                weight.rewire(Topology(weight.shape, torch.from_numpy(positions)))

    return Start(make, require=lambda weights: weights.require(density))


def by_score(
    density: float | None,
    score: Score,
    allocate: Allocation,
    *,
    needs_gradient: bool = False,
    structure: Structure | None = None,
) -> Start:
    """The entries of highest `score` within the counts of `allocate`, in patterns of a `structure` if there is one."""

    def make(weights: Weights, probe: Probe) -> None:
        prune_to(weights, None if density is None else weights.total(density), score, allocate, structure)

    return Start(make, needs_gradient, lambda weights: weights.require(density))


def scale_to_fan_in(weights: Weights) -> None:
    """Scale first values to the fan-in that each output really has: by sqrt(dense fan-in / active fan-in).

    Source: Evci et al. 2022, Gradient Flow in Sparse Neural Networks and How Lottery Tickets Win, section 3.1.
    """
    for weight in weights:
        values = weight.values()
        scale = fan_in_scale(weight.topology, weight.out_axis).to(values.device)
        weight.set_values((values.double() * scale).to(values.dtype))
