"""Which share of all dropped entries each weight gets back: finite also for weights without active entries.

A statistic is called with a weight as it is before the drop and the topology of what it keeps.

Source: Dettmers and Zettlemoyer 2019, Sparse Networks from Scratch, section 3 and its code's alternatives, which read
the weight before the drop; Mostafa and Wang 2019 for `survivors`.
"""

from __future__ import annotations

from torch import Tensor

from regrow.core.topology import Topology
from regrow.core.weight import SparseWeight
from regrow.parts.remembered import MOMENTUM


def mean_momentum(weight: SparseWeight, kept: Topology) -> float:
    """Mean |v| over active entries, with v from `keep_momentum`; 0 for an empty weight."""
    momentum = MOMENTUM.of(weight)
    return _mean(momentum[weight.topology.entries.to(momentum.device)].abs())


def mean_magnitude(weight: SparseWeight, kept: Topology) -> float:
    """Mean |w| over active entries; 0 for an empty weight."""
    return _mean(weight.values().abs())


def nonzeros(weight: SparseWeight, kept: Topology) -> float:
    """Number of active entries whose value is not zero."""
    return float((weight.values() != 0).sum())


def survivors(weight: SparseWeight, kept: Topology) -> float:
    """Number of units that stay.

    Source: Mostafa and Wang 2019, Parameter Efficient Training of Deep Convolutional Neural Networks by Dynamic Sparse
    Reparameterization, Algorithm 1 (l_i).
    """
    return float(kept.active)


def _mean(values: Tensor) -> float:
    return float(values.double().mean()) if values.numel() else 0.0
