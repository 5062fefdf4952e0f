"""Where new entries appear: growths, and the fields that they rank."""

from __future__ import annotations

import math
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
        pool = _Pool(count)
        for first, values in field(weight):
            score = values.abs() if values.dtype == torch.float64 else values.abs().float()
            if not selection.is_finite(score):
                bad = int((~score.isfinite()).sum())
                raise ValueError(
                    f"{weight.name}: {bad:,} of {score.numel():,} growth scores are not finite: lower the "
                    "learning rate, or skip such steps with a gradient scaler"
                )
            pool.offer(first, _outside(score, first, taken))
        positions = pool.best()
        if positions.numel() < count:
            raise ValueError(f"{weight.name}: cannot grow {count:,} entries, only {positions.numel():,} are free")
        return positions

    return grow


class _Pool:
    """A running selection of the `count` highest scores; equal scores go to the lower position."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.floor = -1.0
        """What a score must exceed; all that were offered before and are no longer held are at most this."""
        self.positions: list[Tensor] = []
        self.scores: list[Tensor] = []

    def offer(self, first: int, score: Tensor) -> None:
        """Consider `score` (n,) of the positions from `first` on; blocks come in ascending order."""
        at = (score > self.floor).nonzero().view(-1)
        if at.numel() > self.count:
            at = at[selection.highest(score[at], self.count)]
        self.positions.append(at + first)
        self.scores.append(score[at])
        held = sum(s.numel() for s in self.scores)
        # Selecting anew at every block would cost more than the blocks where these are small.
        if held >= self.count * (1.5 if self.floor >= 0 else 1):
            self._select()

    def _select(self) -> None:
        positions, scores = torch.cat(self.positions), torch.cat(self.scores)
        if scores.numel() >= self.count:
            chosen = selection.highest(scores, self.count)
            positions, scores = positions[chosen], scores[chosen]
            self.floor = float(scores.min()) if self.count else math.inf
        self.positions, self.scores = [positions], [scores]

    def best(self) -> Tensor:
        """Positions of the highest scores, ascending, (count,) or fewer where fewer were offered."""
        if not self.positions:
            return torch.empty(0, dtype=torch.int64)
        self._select()
        return self.positions[0]


def _outside(score: Tensor, first: int, taken: Topology) -> Tensor:
    """`score` with -1 at taken positions: below any absolute value."""
    score[(taken.between(first, first + score.numel()) - first).to(score.device)] = -1.0
    return score
