"""Permutations of a weight's inputs: how one is trained as a doubly stochastic matrix, and becomes an order at last."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from regrow.core.method import Parts
from regrow.parts.remembered import INPUT_ORDER, PATTERN, PERMUTATION


def permuted(parts: Parts) -> Tensor:
    """S M: the values of a `PATTERN`, S, whose inputs are mixed by the `PERMUTATION`, M, or put in the `INPUT_ORDER`.

    While they are mixed, gradients pass to v as if S were v everywhere.

    Source: Tyagi et al. 2025, Efficient Dynamic Structured Sparse Training with Learned Shuffles, section 4.3.
    """
    pattern = PATTERN.of(parts)
    if INPUT_ORDER.known(parts):
        return (parts.latent * pattern).index_select(parts.in_axis, INPUT_ORDER.of(parts))
    values = parts.latent.detach()
    straight = values * pattern + (parts.latent - values)
    return (straight.movedim(parts.in_axis, -1) @ PERMUTATION.of(parts)).movedim(-1, parts.in_axis)


def near_identity(spread: float) -> Callable[[Parts], Tensor]:
    """First values: (1 - spread) I + spread / inputs, which is doubly stochastic, (inputs, inputs)."""

    def first(parts: Parts) -> Tensor:
        inputs = parts.latent.shape[parts.in_axis]
        identity = torch.eye(inputs, dtype=parts.latent.dtype, device=parts.latent.device)
        return (1 - spread) * identity + spread / max(1, inputs)

    return first


def permutation_distance(matrix: Tensor) -> Tensor:
    """The sum over rows and columns of ||.||_1 - ||.||_2, a scalar: 0 for a permutation alone, if doubly stochastic.

    Args:
        matrix: (n, n), at least 0.

    Source: Lyu et al. 2020, AutoShuffleNet; the penalty of Tyagi et al. 2025, Learned Shuffles, section 4.3.
    """
    return sum((matrix.abs().sum(a) - torch.linalg.vector_norm(matrix, dim=a)).sum() for a in (0, 1))  # type: ignore


def make_doubly_stochastic(matrix: Tensor) -> None:
    """Cut off what is negative, then divide columns and rows by their sums, in place: (n, n), once each.

    Source: the code of Tyagi et al. 2025, Learned Shuffles.
    """
    matrix.clamp_(min=0)
    for axis in (0, 1):
        sums = matrix.sum(axis, keepdim=True)
        matrix.div_(torch.where(sums == 0, 1.0, sums))


def assignment(score: Tensor) -> Tensor:
    """The row that each column is given, (n,) int64, no row twice, with the largest sum of scores (n, n).

    Raises:
        ValueError: when a score is not finite.

    Source: the Hungarian method by shortest augmenting paths, Jonker and Volgenant 1987.

    Examples:
        >>> assignment(torch.tensor([[0.6, 0.4], [0.5, 0.1]])).tolist()
        [1, 0]
    """
    cost: NDArray[np.float64] = -score.detach().double().cpu().numpy()
    if not np.isfinite(cost).all():
        raise ValueError(f"{int((~np.isfinite(cost)).sum()):,} of {cost.size:,} scores are not finite")
    size = len(cost)
    # Number 0 is a column outside of the matrix, which holds the row that is given next.
    rows, columns = np.zeros(size + 1), np.zeros(size + 1)
    holder = np.zeros(size + 1, dtype=np.int64)
    for row in range(1, size + 1):
        holder[0], at = row, 0
        least, before = np.full(size + 1, math.inf), np.zeros(size + 1, dtype=np.int64)
        seen = np.zeros(size + 1, dtype=bool)
        while True:
            seen[at] = True
            reduced = np.append(math.inf, cost[holder[at] - 1] - rows[holder[at]]) - columns
            better = ~seen & (reduced < least)
            least[better], before[better] = reduced[better], at
            at_next = int(np.where(seen, math.inf, least).argmin())
            step = least[at_next]
            rows[holder[seen]] += step
            columns[seen] -= step
            least[~seen] -= step
            at = at_next
            if holder[at] == 0:
                break
        while at:
            holder[at], at = holder[before[at]], int(before[at])
    return torch.from_numpy(holder[1:] - 1)
