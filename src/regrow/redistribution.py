"""Which share of all dropped entries each weight gets back: statistics of its active entries, finite when empty.

Source: Dettmers and Zettlemoyer 2019, Sparse Networks from Scratch, section 3 and its code's alternatives.
"""

from __future__ import annotations

from torch import Tensor

from regrow.observers import momentum_of
from regrow.weight import SparseWeight


def mean_momentum(weight: SparseWeight) -> float:
    """Mean |v| over active entries, with v from `observers.momentum`; 0 for an empty weight."""
    momentum = momentum_of(weight)
    return _mean(momentum[weight.topology.indices.to(momentum.device)].abs())


def mean_magnitude(weight: SparseWeight) -> float:
    """Mean |w| over active entries; 0 for an empty weight."""
    return _mean(weight.values().abs())


def nonzeros(weight: SparseWeight) -> float:
    """Number of active entries whose value is not zero."""
    return float((weight.values() != 0).sum())


def _mean(values: Tensor) -> float:
    return float(values.double().mean()) if values.numel() else 0.0
