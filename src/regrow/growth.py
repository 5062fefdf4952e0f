"""Where new entries appear: growths, and the fields that they rank."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from regrow import selection
from regrow.method import Field, Growth
from regrow.observers import momentum_of
from regrow.topology import Topology
from regrow.weight import SparseWeight


def gradient(weight: SparseWeight) -> Iterator[tuple[int, Tensor]]:
    """The gradient of the loss at every position, inactive ones included; a `Field`.

    Source: Evci et al. 2020, Rigging the Lottery, section 3, (4) Grow criterion.
    """
    return weight.grad_blocks()


def momentum(weight: SparseWeight) -> Iterator[tuple[int, Tensor]]:
    """The running mean of gradients that `observers.momentum` keeps at every position; a `Field`.

    Source: Dettmers and Zettlemoyer 2019, Sparse Networks from Scratch, section 3.
    """
    yield 0, momentum_of(weight)


def at_random(weight: SparseWeight, taken: Topology, count: int) -> Tensor:
    """Positions drawn uniformly among those outside `taken`, in O(count + nnz); a `Growth`.

    Source: Mocanu et al. 2018, Algorithm 1.
    """
    ranks = torch.from_numpy(weight.generator.subset(taken.numel - taken.nnz, count))
    return taken.inactive(ranks)


def highest(field: Field) -> Growth:
    """Grow where |field| is highest outside the taken topology; equal values go to the lower position.

    The field is consumed block by block with a running selection, so that no more than a block and the `count`
    best positions are ever held.

    Raises:
        ValueError: from the growth, when the field is not finite, naming the weight.

    Source: Evci et al. 2020, Rigging the Lottery, section 3, and its remark on an online top-k in appendix H.
    """

    def grow(weight: SparseWeight, taken: Topology, count: int) -> Tensor:
        positions = torch.empty(0, dtype=torch.int64)
        best = torch.empty(0)
        for first, values in field(weight):
            score = values.abs() if values.dtype == torch.float64 else values.abs().float()
            if not selection.is_finite(score):
                bad = int((~score.isfinite()).sum())
                raise ValueError(
                    f"{weight.name}: {bad:,} of {score.numel():,} growth scores are not finite: lower the "
                    "learning rate, or skip such steps with a gradient scaler"
                )
            score = _outside(score, first, taken)
            at, found = _candidates(score, count, best)
            positions = torch.cat([positions.to(at.device), at + first])
            best = torch.cat([best.to(found), found])
            chosen = selection.highest(best, min(count, best.numel()))
            positions, best = positions[chosen], best[chosen]
        if positions.numel() < count:
            raise ValueError(f"{weight.name}: cannot grow {count:,} entries, only {positions.numel():,} are free")
        return positions

    return grow


def _outside(score: Tensor, first: int, taken: Topology) -> Tensor:
    """`score` with -1 at taken positions: below any absolute value."""
    score[(taken.between(first, first + score.numel()) - first).to(score.device)] = -1.0
    return score


def _candidates(score: Tensor, count: int, best: Tensor) -> tuple[Tensor, Tensor]:
    """Positions and scores in this block that may belong among the `count` best, in ascending position."""
    floor = best.min() if best.numel() == count and count else torch.zeros((), dtype=score.dtype)
    at = selection.highest(score, min(count, score.numel()))
    at = at[score[at] >= floor.to(score)]
    return at, score[at]
