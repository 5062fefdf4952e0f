"""What stays when every weight loses a fraction of its active entries."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from regrow.method import Drop, Score
from regrow.topology import Topology
from regrow.weight import SparseWeight


def keep_highest(weight: SparseWeight, score: Tensor, count: int) -> Topology:
    """The `count` active entries of highest `score` (nnz,).

    Raises:
        ValueError: when a score is NaN, naming the weight.
    """
    try:
        return weight.topology.keep(score, count)
    except ValueError as error:
        raise ValueError(f"{weight.name}: {error}") from None


def lowest(score: Score) -> Drop:
    """Drop the floor(fraction nnz) entries of lowest `score` from every weight; ties drop the higher position.

    Source: Evci et al. 2020, Rigging the Lottery, Algorithm 1, line "TopK(|theta|, ...)".
    """

    def drop(weights: Sequence[SparseWeight], fractions: Sequence[float]) -> list[Topology]:
        kept = [w.topology.nnz - share(f, w.topology.nnz) for w, f in zip(weights, fractions, strict=True)]
        return [
            keep_highest(w, score(w), n) if n < w.topology.nnz else w.topology
            for w, n in zip(weights, kept, strict=True)
        ]

    return drop


def lowest_per_sign(weights: Sequence[SparseWeight], fractions: Sequence[float]) -> list[Topology]:
    """Drop the smallest positive and the largest negative values: ceil(fraction n) of each sign, and every zero.

    Source: Mocanu et al. 2018, Scalable training of artificial neural networks with adaptive sparse connectivity
    inspired by network science, Algorithm 1 and its published code. A weight of which the fraction is 0 keeps
    its zeros here, so that a fraction of 0 changes nothing.
    """
    return [_per_sign(w, f) for w, f in zip(weights, fractions, strict=True)]


def _per_sign(weight: SparseWeight, fraction: float) -> Topology:
    if fraction == 0:
        return weight.topology
    values = weight.values()
    if bool(values.isnan().any()):
        raise ValueError(f"{weight.name}: {int(values.isnan().sum()):,} of {values.numel():,} values are NaN: diverged")
    indices = weight.topology.indices.to(values.device)
    kept = []
    for of_sign in (values > 0, values < 0):
        count = int(of_sign.sum())
        chosen = Topology(weight.shape, indices[of_sign])
        kept.append(chosen.keep(values[of_sign].abs(), count - min(count, math.ceil(fraction * count - 1e-9))).indices)
    return Topology(weight.shape, torch.cat(kept).sort().values)


def share(fraction: float, nnz: int) -> int:
    """floor(fraction nnz), forgiving the representation error of products like 0.29 x 100: 1e-9, or 4 ulp if more."""
    exact = fraction * nnz
    return min(nnz, math.floor(exact + max(1e-9, 4 * math.ulp(exact))))
