"""Which entries of one weight are active: an immutable value with exact integer counts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from regrow import selection


@dataclass(frozen=True, eq=False)
class Topology:
    """The active entries of a weight of `shape`: ascending flat positions in row-major order.

    Args:
        shape: the weight's shape.
        positions: (nnz,) int64, strictly ascending, in [0, numel); None means that every entry is active, and
            costs no memory.

    Raises:
        ValueError: when positions are out of range, unsorted or repeated.

    Examples:
        >>> topology = Topology((2, 3), torch.tensor([0, 4]))
        >>> topology.nnz, topology.numel, topology.mask.int().tolist()
        (2, 6, [[1, 0, 0], [0, 1, 0]])
    """

    shape: tuple[int, ...]
    positions: Tensor | None = None

    def __post_init__(self) -> None:
        at = self.positions
        if at is None:
            return
        if at.dtype != torch.int64 or at.dim() != 1:
            raise ValueError(f"positions must be int64 of shape (nnz,), got {at.dtype} of shape {tuple(at.shape)}")
        if at.numel() == 0:
            return
        if not (0 <= int(at[0]) and int(at[-1]) < self.numel and bool((at.diff() > 0).all())):
            raise ValueError(
                f"positions in a weight of shape {self.shape} must ascend strictly within [0, {self.numel:,})"
            )

    @property
    def numel(self) -> int:
        """Number of entries, active or not."""
        return math.prod(self.shape)

    @property
    def nnz(self) -> int:
        """Number of active entries."""
        return self.numel if self.positions is None else self.positions.numel()

    @property
    def density(self) -> float:
        """nnz / numel; 1 for a weight without entries."""
        return self.nnz / self.numel if self.numel else 1.0

    @property
    def is_dense(self) -> bool:
        """Whether every entry is active."""
        return self.nnz == self.numel

    @cached_property
    def indices(self) -> Tensor:
        """(nnz,) int64 ascending flat positions of the active entries."""
        return torch.arange(self.numel) if self.positions is None else self.positions

    @property
    def mask(self) -> Tensor:
        """Bool tensor of `shape`, formed anew at each call: O(numel) memory."""
        if self.positions is None:
            return torch.ones(self.shape, dtype=torch.bool)
        mask = torch.zeros(self.numel, dtype=torch.bool, device=self.positions.device)
        mask[self.positions] = True
        return mask.view(self.shape)

    def keep(self, score: Tensor, count: int) -> Topology:
        """The `count` active entries of highest `score` (nnz,); equal scores go to the lower position."""
        if score.numel() != self.nnz:
            raise ValueError(f"keep needs one score for each of the {self.nnz:,} active entries, got {score.numel():,}")
        if count == self.nnz:
            return self
        return Topology(self.shape, self.indices.to(score.device)[selection.highest(score, count)])

    def add(self, positions: Tensor) -> Topology:
        """With `positions` (count,), distinct inactive flat positions in any order, active too."""
        if positions.numel() == 0:
            return self
        return Topology(self.shape, torch.cat([self.indices.to(positions.device), positions]).sort().values)

    def contains(self, positions: Tensor) -> Tensor:
        """Which of `positions` (n,) are active, bool (n,), in O(n log nnz)."""
        if self.positions is None or self.nnz == 0:
            return torch.full(positions.shape, self.positions is None, device=positions.device)
        active = self.positions.to(positions.device)
        at = torch.searchsorted(active, positions).clamp(max=self.nnz - 1)
        return active[at] == positions

    def without(self, other: Topology) -> Tensor:
        """Flat positions active here and not in `other`, ascending."""
        return self.indices[~other.contains(self.indices)]

    def inactive(self, ranks: Tensor) -> Tensor:
        """Flat positions of the inactive entries numbered `ranks` (n,) in ascending order, in O(n log nnz).

        The inactive entries are never listed: before the i-th active entry lie indices[i] - i of them.
        """
        gaps = self.indices - torch.arange(self.nnz, device=self.indices.device)
        ranks = ranks.to(gaps.device)
        return ranks + torch.searchsorted(gaps, ranks, right=True)

    def to(self, device: torch.device) -> Topology:
        """The same topology with its positions on `device`."""
        if self.positions is None or self.positions.device == device:
            return self
        return Topology(self.shape, self.positions.to(device))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Topology):
            return NotImplemented
        if self is other:
            return True
        if self.shape != other.shape or self.nnz != other.nnz:
            return False
        return self.is_dense or torch.equal(self.indices.cpu(), other.indices.cpu())

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Topology(shape={self.shape}, nnz={self.nnz:,}, density={self.density:.4g})"
