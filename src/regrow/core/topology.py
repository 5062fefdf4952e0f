"""Which entries of one weight are active: an immutable value with exact integer counts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from regrow.core import selection

_INT32 = torch.iinfo(torch.int32).max
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_CHUNK = 1 << 18
"""Entries of which flat positions are formed at once, so that set operations need little memory beside the result."""


@dataclass(frozen=True, init=False, eq=False, repr=False)
class Topology:
    """The active entries of a weight of `shape`, held row by row: a row is all that shares the first index.

    Four bytes per active entry (eight where a row has 2^31 entries or more) and eight per row; none when dense. Flat
    positions count in row-major order, and every (nnz,) tensor of a weight follows them ascending.

    Args:
        shape: the weight's shape.
        positions: (nnz,) int64, strictly ascending flat positions in [0, numel); None means that every entry is
            active, and costs no memory.

    Raises:
        ValueError: when positions are out of range, unsorted or repeated.

    Examples:
        >>> topology = Topology((2, 3), torch.tensor([0, 4]))
        >>> topology.nnz, topology.numel, topology.mask.int().tolist()
        (2, 6, [[1, 0, 0], [0, 1, 0]])
        >>> topology.starts.tolist(), topology.columns.tolist()
        ([0, 1, 2], [0, 1])
    """

    shape: tuple[int, ...]
    _starts: Tensor | None
    _columns: Tensor | None

    def __init__(self, shape: tuple[int, ...], positions: Tensor | None = None) -> None:
        self._set(shape, None, None)
        if positions is None:
            return
        if positions.dtype != torch.int64 or positions.dim() != 1:
            raise ValueError(
                f"positions must be int64 of shape (nnz,), got {positions.dtype} of shape {tuple(positions.shape)}"
            )
        if positions.numel() and not (
            0 <= int(positions[0]) and int(positions[-1]) < self.numel and _ascend(positions)
        ):
            raise ValueError(
                f"positions in a weight of shape {self.shape} must ascend strictly within [0, {self.numel:,})"
            )
        edges = torch.arange(self.rows + 1, device=positions.device) * self.row_size
        columns = (positions % max(1, self.row_size)).to(self._column_type)
        self._set(shape, torch.searchsorted(positions.contiguous(), edges), columns)

    def _set(self, shape: tuple[int, ...], starts: Tensor | None, columns: Tensor | None) -> Topology:
        """The one place where the fields get their values."""
        for name, value in (("shape", shape), ("_starts", starts), ("_columns", columns)):
            object.__setattr__(self, name, value)
        return self

    @classmethod
    def from_rows(cls, shape: tuple[int, ...], starts: Tensor, columns: Tensor) -> Topology:
        """The topology in which row i has the entries columns[starts[i]:starts[i + 1]].

        Args:
            shape: the weight's shape.
            starts: (rows + 1,) int64, from 0 to nnz.
            columns: (nnz,) integer, strictly ascending within each row, in [0, row_size).

        Raises:
            ValueError: when they are anything else.
        """
        topology = cls(shape)
        rows, size = topology.rows, topology.row_size
        if starts.dtype not in _INTEGERS or columns.dtype not in _INTEGERS or starts.dim() != 1 or columns.dim() != 1:
            raise ValueError(
                f"rows of a weight of shape {shape} are one-dimensional integers, got starts of {starts.dtype} and "
                f"shape {tuple(starts.shape)}, and columns of {columns.dtype} and shape {tuple(columns.shape)}"
            )
        # Neighbours are compared, since differences of huge or unsigned numbers wrap around. Kernels read dense memory.
        starts = starts.to(torch.int64).contiguous()
        sound = starts.numel() == rows + 1 and int(starts[0]) == 0 and int(starts[-1]) == columns.numel()
        sound = sound and bool((starts[1:] >= starts[:-1]).all())
        if sound and columns.numel():
            ascending = columns[1:] > columns[:-1]
            inner = starts[1:-1]
            ascending[(inner[(inner > 0) & (inner < columns.numel())] - 1)] = True
            sound = 0 <= int(columns.min()) and int(columns.max()) < size and bool(ascending.all())
        if not sound:
            raise ValueError(
                f"columns of a weight of shape {shape} must ascend within each of its {rows:,} rows of {size:,} entries"
            )
        return topology._set(shape, starts, columns.to(topology._column_type).contiguous())

    @classmethod
    def trusted(cls, shape: tuple[int, ...], starts: Tensor, columns: Tensor) -> Topology:
        """`from_rows` without a look at what is known to be sound, sharing its memory."""
        return cls(shape)._set(shape, starts, columns)

    @classmethod
    def stack(cls, topologies: Sequence[Topology]) -> Topology:
        """One topology of all rows of `topologies`, whose shapes differ in the first axis at most."""
        first = topologies[0]
        if len(topologies) == 1:
            return first
        shape = (sum(t.rows for t in topologies), *first.shape[1:])
        if all(t._columns is None for t in topologies):
            return cls(shape)
        device = next(t.device for t in topologies if t._columns is not None)
        counts = torch.cat([t.starts.diff().to(device) for t in topologies])
        starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return cls.trusted(shape, starts, torch.cat([t.columns.to(device) for t in topologies]))

    def block(self, low: int, high: int) -> Topology:
        """The topology of rows [low, high), sharing memory with this one."""
        shape = (high - low, *self.shape[1:])
        if (low, high) == (0, self.rows) or self._starts is None or self._columns is None:
            return self if shape == self.shape else Topology(shape)
        starts = self._starts[low : high + 1]
        first, last = int(starts[0]), int(starts[-1])
        return Topology.trusted(shape, starts - first, self._columns[first:last])

    @property
    def rows(self) -> int:
        """The length of the first axis."""
        return self.shape[0] if self.shape else 1

    @property
    def row_size(self) -> int:
        """Entries of one row, active or not."""
        return math.prod(self.shape[1:])

    @property
    def numel(self) -> int:
        """Number of entries, active or not."""
        return math.prod(self.shape)

    @property
    def nnz(self) -> int:
        """Number of active entries."""
        return self.numel if self._columns is None else self._columns.numel()

    @property
    def density(self) -> float:
        """nnz / numel; 1 for a weight without entries."""
        return self.nnz / self.numel if self.numel else 1.0

    @property
    def is_dense(self) -> bool:
        """Whether every entry is active."""
        return self.nnz == self.numel

    @property
    def device(self) -> torch.device:
        """Where the topology lies; a dense one needs no place and says CPU."""
        return torch.device("cpu") if self._columns is None else self._columns.device

    @property
    def starts(self) -> Tensor:
        """(rows + 1,) int64: where each row begins among the active entries."""
        return torch.arange(self.rows + 1) * self.row_size if self._starts is None else self._starts

    @property
    def columns(self) -> Tensor:
        """(nnz,) int32, or int64 where a row is longer than that: the place of each active entry in its row."""
        if self._columns is None:
            return torch.arange(self.row_size, dtype=self._column_type).repeat(self.rows)
        return self._columns

    @property
    def positions(self) -> Tensor | None:
        """(nnz,) int64 ascending flat positions of the active entries, formed anew; None when given as dense."""
        return None if self._columns is None else self.indices

    @property
    def indices(self) -> Tensor:
        """(nnz,) int64 ascending flat positions of the active entries, formed anew at each call."""
        return self._indices(0, self.rows)

    @property
    def mask(self) -> Tensor:
        """Bool tensor of `shape`, formed anew at each call: O(numel) memory."""
        if self._columns is None:
            return torch.ones(self.shape, dtype=torch.bool)
        mask = torch.zeros(self.numel, dtype=torch.bool, device=self.device)
        mask[self.indices] = True
        return mask.view(self.shape)

    @property
    def _column_type(self) -> torch.dtype:
        return torch.int32 if self.row_size <= _INT32 else torch.int64

    def keep(self, score: Tensor, count: int) -> Topology:
        """The `count` active entries of highest `score` (nnz,); equal scores go to the lower position."""
        if score.numel() != self.nnz:
            raise ValueError(f"keep needs one score for each of the {self.nnz:,} active entries, got {score.numel():,}")
        if count == self.nnz:
            return self
        return self.pick(selection.highest(score, count))

    def pick(self, ranks: Tensor) -> Topology:
        """The active entries numbered `ranks` (n,), ascending."""
        if self._starts is None or self._columns is None:
            return Topology(self.shape, ranks)
        starts = torch.searchsorted(ranks, self._starts.to(ranks.device))
        return Topology.trusted(self.shape, starts, self._columns.to(ranks.device)[ranks])

    def add(self, positions: Tensor) -> Topology:
        """With `positions` (count,), distinct inactive flat positions in any order, active too."""
        if positions.numel() == 0:
            return self
        own, positions = self.to(positions.device), positions.sort().values
        if not 0 <= int(positions[0]) <= int(positions[-1]) < self.numel:
            raise ValueError(f"positions in a weight of shape {self.shape} must lie within [0, {self.numel:,})")
        starts = own.starts + torch.searchsorted(positions, own._edges(0, self.rows))
        columns = torch.empty(self.nnz + positions.numel(), dtype=self._column_type, device=positions.device)
        for low, high in self._row_chunks(positions.numel()):
            edges = own._edges(low, high)[[0, -1]]
            first, last = torch.searchsorted(positions, edges).tolist()
            merged = torch.cat([own._indices(low, high), positions[first:last]]).sort().values
            if not bool((merged.diff() > 0).all()):
                raise ValueError(f"positions added to a weight of shape {self.shape} must be distinct and inactive")
            columns[int(starts[low]) : int(starts[high])] = merged.remainder_(self.row_size)
        return Topology.trusted(self.shape, starts, columns)

    def contains(self, positions: Tensor) -> Tensor:
        """Which of `positions` (n,) are active, bool (n,), in O(n log nnz)."""
        if self._columns is None or self.nnz == 0:
            return torch.full(positions.shape, self._columns is None, device=positions.device)
        active = self.indices.to(positions.device)
        at = torch.searchsorted(active, positions).clamp_(max=self.nnz - 1)
        return active[at] == positions

    def without(self, other: Topology) -> Tensor:
        """Flat positions active here and not in `other`, ascending."""
        parts = [here[~found] for low, high in self._row_chunks() for here, found, _ in [self._find(low, high, other)]]
        return torch.cat(parts) if parts else self.indices

    def ranks_in(self, other: Topology) -> Tensor:
        """Where each active entry stands among those of `other`, -1 where it is not among them.

        Returns:
            (nnz,) int32, or int64 where `other` has 2^31 entries or more.
        """
        dtype = torch.int32 if other.nnz <= _INT32 else torch.int64
        ranks = torch.empty(self.nnz, dtype=dtype, device=self.device)
        for low, high in self._row_chunks():
            here, found, at = self._find(low, high, other)
            first = int(self.starts[low])
            ranks[first : first + here.numel()] = torch.where(found, at, -1)
        return ranks

    def between(self, low: int, high: int) -> Tensor:
        """Flat positions of the active entries in [low, high), ascending, at the cost of the rows that they touch."""
        if self._columns is None:
            return torch.arange(low, min(high, self.numel))
        size = max(1, self.row_size)
        near = self._indices(min(self.rows, low // size), min(self.rows, -(-high // size)))
        first, last = torch.searchsorted(near, torch.tensor([low, high], device=near.device)).tolist()
        return near[first:last]

    def _edges(self, low: int, high: int) -> Tensor:
        """(high - low + 1,) flat positions where rows low, ..., high begin."""
        return torch.arange(low, high + 1, device=self.device) * self.row_size

    def _indices(self, low: int, high: int) -> Tensor:
        """Flat positions of the active entries in rows [low, high)."""
        if self._starts is None or self._columns is None:
            return torch.arange(low * self.row_size, high * self.row_size)
        starts = self._starts[low : high + 1]
        first, last = int(starts[0]), int(starts[-1])
        begin = self._edges(low, high)[:-1]
        return begin.repeat_interleave(starts.diff(), output_size=last - first).add_(self._columns[first:last])

    def _row_chunks(self, more: int = 0) -> Iterator[tuple[int, int]]:
        """Ranges of rows that together cover all, each of about `_CHUNK` entries where rows are not longer."""
        step = max(1, _CHUNK * self.rows // max(1, self.nnz + more))
        for low in range(0, self.rows, step):
            yield low, min(self.rows, low + step)

    def _find(self, low: int, high: int, other: Topology) -> tuple[Tensor, Tensor, Tensor]:
        """Flat positions in rows [low, high), whether each is in `other`, and its rank there, all (n,)."""
        here, there = self._indices(low, high), other.to(self.device)._indices(low, high)
        at = torch.searchsorted(there, here)
        found = there[at.clamp(max=max(0, there.numel() - 1))] == here if there.numel() else here < 0
        return here, found, at + (int(other.starts[low]) if other._starts is not None else low * self.row_size)

    def inactive(self, ranks: Tensor) -> Tensor:
        """Flat positions of the inactive entries numbered `ranks` (n,) in ascending order, in O(n log nnz).

        The inactive entries are never listed: before the i-th active entry lie indices[i] - i of them.
        """
        gaps = self.indices
        gaps -= torch.arange(self.nnz, device=gaps.device)
        ranks = ranks.to(gaps.device)
        return ranks + torch.searchsorted(gaps, ranks, right=True)

    def to(self, device: torch.device) -> Topology:
        """The same topology on `device`."""
        if self._starts is None or self._columns is None or self.device == device:
            return self
        return Topology.trusted(self.shape, self._starts.to(device), self._columns.to(device))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Topology):
            return NotImplemented
        if self is other:
            return True
        if self.shape != other.shape or self.nnz != other.nnz:
            return False
        return self.is_dense or (
            torch.equal(self.starts.cpu(), other.starts.cpu()) and torch.equal(self.columns.cpu(), other.columns.cpu())
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Topology(shape={self.shape}, nnz={self.nnz:,}, density={self.density:.4g})"


def _ascend(positions: Tensor) -> bool:
    """Whether each is larger than the one before; compared, since differences of huge numbers wrap around."""
    return bool((positions[1:] > positions[:-1]).all())


def fan_in_scale(topology: Topology, out_axis: int = 0) -> Tensor:
    """sqrt(fan-in of the dense weight / active fan-in of the same output) at each active entry, (nnz,).

    Values drawn for the dense weight and multiplied by this keep the variance of every output that is connected.

    Source: Evci et al. 2022, Gradient Flow in Sparse Neural Networks and How Lottery Tickets Win, section 3.1: each
    neuron is initialized by the number of connections it has.
    """
    outputs = topology.indices
    outputs //= math.prod(topology.shape[out_axis + 1 :])
    outputs %= topology.shape[out_axis]
    active = torch.bincount(outputs, minlength=topology.shape[out_axis])
    return (topology.numel / topology.shape[out_axis] / active[outputs].double()).sqrt()
