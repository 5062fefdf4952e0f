"""Which entries of one weight are active: an immutable value with exact integer counts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from regrow.core import selection, units

_INT32 = torch.iinfo(torch.int32).max
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_CHUNK = 1 << 18
"""Entries of which flat positions are formed at once, so that set operations need little memory beside the result."""


@dataclass(frozen=True, init=False, eq=False, repr=False)
class Topology:
    """The active units of a weight of `shape`, held row by row: a row is all that shares the first index of the grid.

    A unit is a box of entries that are active or inactive together, by default a single entry. Units form a grid, and
    flat positions count in it in row-major order. `nnz`, `numel`, `density`, `entries` and `mask` speak of entries, all
    else of units. Every (nnz,) tensor of a weight follows `entries`: unit by unit, in order of position.

    Four bytes per active unit (eight where a row has 2^31 units or more) and eight per row; none when dense.

    Args:
        shape: the weight's shape.
        positions: (active,) int64, strictly ascending flat positions in [0, places); None means that every unit is
            active, and costs no memory.
        unit: how many entries a unit spans along each axis, which it divides; None is 1.

    Raises:
        ValueError: when positions are out of range, unsorted or repeated, or a unit does not divide the shape.

    Examples:
        >>> topology = Topology((2, 3), torch.tensor([0, 4]))
        >>> topology.nnz, topology.numel, topology.mask.int().tolist()
        (2, 6, [[1, 0, 0], [0, 1, 0]])
        >>> topology.starts.tolist(), topology.columns.tolist()
        ([0, 1, 2], [0, 1])
        >>> pairs = Topology((4, 3), torch.tensor([1, 3]), unit=(2, 1))
        >>> pairs.active, pairs.places, pairs.nnz, pairs.entries.tolist()
        (2, 6, 4, [1, 4, 6, 9])
    """

    shape: tuple[int, ...]
    unit: tuple[int, ...]
    _starts: Tensor | None
    _columns: Tensor | None

    def __init__(
        self, shape: tuple[int, ...], positions: Tensor | None = None, unit: tuple[int, ...] | None = None
    ) -> None:
        self._set(shape, unit, None, None)
        if len(self.unit) != len(shape) or any(u < 1 or n % u for n, u in zip(shape, self.unit, strict=False)):
            raise ValueError(
                f"a unit of a weight of shape {shape} has {len(shape)} sizes of at least 1 that divide its own, got "
                f"{unit}"
            )
        if positions is None:
            return
        if positions.dtype != torch.int64 or positions.dim() != 1:
            raise ValueError(
                f"positions must be int64 of shape (nnz,), got {positions.dtype} of shape {tuple(positions.shape)}"
            )
        if positions.numel() and not (
            0 <= int(positions[0]) and int(positions[-1]) < self.places and _ascend(positions)
        ):
            raise ValueError(
                f"positions in a weight of shape {self.shape} must ascend strictly within [0, {self.places:,})"
            )
        edges = torch.arange(self.rows + 1, device=positions.device) * self.row_size
        columns = (positions % max(1, self.row_size)).to(self._column_type)
        self._set(shape, self.unit, torch.searchsorted(positions.contiguous(), edges), columns)

    def _set(
        self, shape: tuple[int, ...], unit: tuple[int, ...] | None, starts: Tensor | None, columns: Tensor | None
    ) -> Topology:
        """The one place where the fields get their values."""
        unit = (1,) * len(shape) if unit is None else unit
        for name, value in (("shape", shape), ("unit", unit), ("_starts", starts), ("_columns", columns)):
            object.__setattr__(self, name, value)
        return self

    @classmethod
    def from_rows(
        cls, shape: tuple[int, ...], starts: Tensor, columns: Tensor, unit: tuple[int, ...] | None = None
    ) -> Topology:
        """The topology in which row i of the grid has the units columns[starts[i]:starts[i + 1]].

        Args:
            shape: the weight's shape.
            starts: (rows + 1,) int64, from 0 to the number of active units.
            columns: (active,) integer, strictly ascending within each row, in [0, row_size).
            unit: how many entries a unit spans along each axis; None is 1.

        Raises:
            ValueError: when they are anything else.
        """
        topology = cls(shape, unit=unit)
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
            what = "entries" if topology.is_unstructured else "units"
            raise ValueError(
                f"columns of a weight of shape {shape} must ascend within each of its {rows:,} rows of {size:,} {what}"
            )
        return topology._set(shape, topology.unit, starts, columns.to(topology._column_type).contiguous())

    @classmethod
    def trusted(
        cls, shape: tuple[int, ...], starts: Tensor, columns: Tensor, unit: tuple[int, ...] | None = None
    ) -> Topology:
        """`from_rows` without a look at what is known to be sound, sharing its memory."""
        return cls(shape)._set(shape, unit, starts, columns)

    def at(self, positions: Tensor | None) -> Topology:
        """The topology of the same weight and units with others active, at `positions` as at construction."""
        return Topology(self.shape, positions, self.unit)

    @classmethod
    def stack(cls, topologies: Sequence[Topology]) -> Topology:
        """One topology of all rows of `topologies`, whose shapes differ in the first axis at most, and units not."""
        first = topologies[0]
        if len(topologies) == 1:
            return first
        shape = (sum(t.shape[0] for t in topologies), *first.shape[1:])
        if all(t._columns is None for t in topologies):
            return cls(shape, unit=first.unit)
        device = next(t.device for t in topologies if t._columns is not None)
        counts = torch.cat([t.starts.diff().to(device) for t in topologies])
        starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return cls.trusted(shape, starts, torch.cat([t.columns.to(device) for t in topologies]), first.unit)

    def block(self, low: int, high: int) -> Topology:
        """The topology of rows [low, high) of the grid, sharing memory with this one."""
        if (low, high) == (0, self.rows):
            return self
        shape = ((high - low) * self.unit[0], *self.shape[1:])
        if self._starts is None or self._columns is None:
            return Topology(shape, unit=self.unit)
        starts = self._starts[low : high + 1]
        first, last = int(starts[0]), int(starts[-1])
        return Topology.trusted(shape, starts - first, self._columns[first:last], self.unit)

    @property
    def grid(self) -> tuple[int, ...]:
        """How many units lie along each axis; the shape itself where a unit is an entry."""
        return tuple(size // step for size, step in zip(self.shape, self.unit, strict=True))

    @property
    def is_unstructured(self) -> bool:
        """Whether a unit is an entry."""
        return self.unit_size == 1

    @property
    def unit_size(self) -> int:
        """Entries of a unit."""
        return math.prod(self.unit)

    @property
    def rows(self) -> int:
        """Rows of the grid."""
        return self.shape[0] // self.unit[0] if self.shape else 1

    @property
    def row_size(self) -> int:
        """Units of one row, active or not."""
        return math.prod(self.grid[1:])

    @property
    def places(self) -> int:
        """Number of units, active or not."""
        return math.prod(self.grid)

    @property
    def active(self) -> int:
        """Number of active units."""
        return self.places if self._columns is None else self._columns.numel()

    @property
    def numel(self) -> int:
        """Number of entries, active or not."""
        return math.prod(self.shape)

    @property
    def nnz(self) -> int:
        """Number of active entries."""
        return self.numel if self._columns is None else self._columns.numel() * self.unit_size

    @property
    def density(self) -> float:
        """nnz / numel; 1 for a weight without entries."""
        return self.nnz / self.numel if self.numel else 1.0

    @property
    def is_dense(self) -> bool:
        """Whether every entry is active."""
        return self.active == self.places

    @property
    def device(self) -> torch.device:
        """Where the topology lies; a dense one needs no place and says CPU."""
        return torch.device("cpu") if self._columns is None else self._columns.device

    @property
    def starts(self) -> Tensor:
        """(rows + 1,) int64: where each row begins among the active units."""
        return torch.arange(self.rows + 1) * self.row_size if self._starts is None else self._starts

    @property
    def columns(self) -> Tensor:
        """(active,) int32, or int64 where a row is longer than that: the place of each active unit in its row."""
        if self._columns is None:
            return torch.arange(self.row_size, dtype=self._column_type).repeat(self.rows)
        return self._columns

    @property
    def positions(self) -> Tensor | None:
        """(active,) int64 ascending flat positions of the active units, formed anew; None when given as dense."""
        return None if self._columns is None else self.indices

    @property
    def indices(self) -> Tensor:
        """(active,) int64 ascending flat positions of the active units, formed anew at each call."""
        return self._indices(0, self.rows)

    @property
    def entries(self) -> Tensor:
        """(nnz,) int64 flat positions of the active entries in the weight, unit by unit, formed anew at each call."""
        return self.entries_of(self.indices)

    def first_entry(self, row: int) -> int:
        """How many entries are active in the rows of the grid before `row`."""
        return int(self.starts[row]) * self.unit_size

    def entries_of(self, positions: Tensor) -> Tensor:
        """(n,) int64 flat positions in the weight of all entries of the units at `positions`, unit by unit."""
        return positions if self.is_unstructured else units.entries(self.shape, self.unit, positions).view(-1)

    @property
    def mask(self) -> Tensor:
        """Bool tensor of `shape`, formed anew at each call: O(numel) memory."""
        if self._columns is None:
            return torch.ones(self.shape, dtype=torch.bool)
        mask = torch.zeros(self.numel, dtype=torch.bool, device=self.device)
        mask[self.entries] = True
        return mask.view(self.shape)

    @property
    def _column_type(self) -> torch.dtype:
        return torch.int32 if self.row_size <= _INT32 else torch.int64

    def keep(self, score: Tensor, count: int) -> Topology:
        """The `count` active units of highest `score` (active,); equal scores go to the lower position."""
        if score.numel() != self.active:
            what = "entries" if self.is_unstructured else "units"
            raise ValueError(
                f"keep needs one score for each of the {self.active:,} active {what}, got {score.numel():,}"
            )
        if count == self.active:
            return self
        return self.pick(selection.highest(score, count))

    def pick(self, ranks: Tensor) -> Topology:
        """The active units numbered `ranks` (n,), ascending."""
        if self._starts is None or self._columns is None:
            return self.at(ranks)
        starts = torch.searchsorted(ranks, self._starts.to(ranks.device))
        return Topology.trusted(self.shape, starts, self._columns.to(ranks.device)[ranks], self.unit)

    def pooled(self, score: Tensor, pool: units.Pool) -> Tensor:
        """One score for each active unit, (active,), of those of the active entries (nnz,)."""
        return score if self.is_unstructured else pool(score.view(-1, self.unit_size))

    def by_entries(self) -> tuple[Topology, Tensor]:
        """The same entries as units of their own, in rows, and which of the values here belongs to each, (nnz,)."""
        positions, order = self.entries.sort()
        return Topology(self.shape, positions), order

    def add(self, positions: Tensor) -> Topology:
        """With the units at `positions` (count,), distinct and inactive, in any order, active too."""
        if positions.numel() == 0:
            return self
        own, positions = self.to(positions.device), positions.sort().values
        if not 0 <= int(positions[0]) <= int(positions[-1]) < self.places:
            raise ValueError(f"positions in a weight of shape {self.shape} must lie within [0, {self.places:,})")
        starts = own.starts + torch.searchsorted(positions, own._edges(0, self.rows))
        columns = torch.empty(self.active + positions.numel(), dtype=self._column_type, device=positions.device)
        for low, high in self._row_chunks(positions.numel()):
            edges = own._edges(low, high)[[0, -1]]
            first, last = torch.searchsorted(positions, edges).tolist()
            merged = torch.cat([own._indices(low, high), positions[first:last]]).sort().values
            if not bool((merged.diff() > 0).all()):
                raise ValueError(f"positions added to a weight of shape {self.shape} must be distinct and inactive")
            columns[int(starts[low]) : int(starts[high])] = merged.remainder_(self.row_size)
        return Topology.trusted(self.shape, starts, columns, self.unit)

    def contains(self, positions: Tensor) -> Tensor:
        """Which of the units at `positions` (n,) are active, bool (n,), in O(n log active)."""
        if self._columns is None or self.active == 0:
            return torch.full(positions.shape, self._columns is None, device=positions.device)
        active = self.indices.to(positions.device)
        at = torch.searchsorted(active, positions).clamp_(max=self.active - 1)
        return active[at] == positions

    def without(self, other: Topology) -> Tensor:
        """Flat positions of the units active here and not in `other`, ascending."""
        parts = [here[~found] for low, high in self._row_chunks() for here, found, _ in [self._find(low, high, other)]]
        return torch.cat(parts) if parts else self.indices

    def ranks_in(self, other: Topology) -> Tensor:
        """Where each active unit stands among those of `other`, -1 where it is not among them.

        Returns:
            (active,) int32, or int64 where `other` has 2^31 units or more.
        """
        dtype = torch.int32 if other.active <= _INT32 else torch.int64
        ranks = torch.empty(self.active, dtype=dtype, device=self.device)
        for low, high in self._row_chunks():
            here, found, at = self._find(low, high, other)
            first = int(self.starts[low])
            ranks[first : first + here.numel()] = torch.where(found, at, -1)
        return ranks

    def entry_ranks_in(self, other: Topology) -> Tensor:
        """Where each active entry stands among the entries of `other`, of the same units, -1 where it is not active.

        Returns:
            (nnz,) int32, or int64 where `other` has 2^31 entries or more.
        """
        ranks = self.ranks_in(other)
        if self.is_unstructured:
            return ranks
        if other.nnz > _INT32:
            ranks = ranks.long()
        inside = torch.arange(self.unit_size, dtype=ranks.dtype, device=ranks.device)
        return torch.where(ranks[:, None] < 0, ranks[:, None], ranks[:, None] * self.unit_size + inside).view(-1)

    def between(self, low: int, high: int) -> Tensor:
        """Flat positions of the active units in [low, high), ascending, at the cost of the rows that they touch."""
        if self._columns is None:
            return torch.arange(low, min(high, self.places))
        size = max(1, self.row_size)
        near = self._indices(min(self.rows, low // size), min(self.rows, -(-high // size)))
        first, last = torch.searchsorted(near, torch.tensor([low, high], device=near.device)).tolist()
        return near[first:last]

    def _edges(self, low: int, high: int) -> Tensor:
        """(high - low + 1,) flat positions where rows low, ..., high begin."""
        return torch.arange(low, high + 1, device=self.device) * self.row_size

    def _indices(self, low: int, high: int) -> Tensor:
        """Flat positions of the active units in rows [low, high) of the grid."""
        if self._starts is None or self._columns is None:
            return torch.arange(low * self.row_size, high * self.row_size)
        starts = self._starts[low : high + 1]
        first, last = int(starts[0]), int(starts[-1])
        begin = self._edges(low, high)[:-1]
        return begin.repeat_interleave(starts.diff(), output_size=last - first).add_(self._columns[first:last])

    def _row_chunks(self, more: int = 0) -> Iterator[tuple[int, int]]:
        """Ranges of rows that together cover all, each of about `_CHUNK` units where rows are not longer."""
        step = max(1, _CHUNK * self.rows // max(1, self.active + more))
        for low in range(0, self.rows, step):
            yield low, min(self.rows, low + step)

    def _find(self, low: int, high: int, other: Topology) -> tuple[Tensor, Tensor, Tensor]:
        """Flat positions in rows [low, high), whether each is in `other`, and its rank there, all (n,)."""
        here, there = self._indices(low, high), other.to(self.device)._indices(low, high)
        at = torch.searchsorted(there, here)
        found = there[at.clamp(max=max(0, there.numel() - 1))] == here if there.numel() else here < 0
        return here, found, at + (int(other.starts[low]) if other._starts is not None else low * self.row_size)

    def inactive(self, ranks: Tensor) -> Tensor:
        """Flat positions of the inactive units numbered `ranks` (n,) in ascending order, in O(n log active).

        The inactive units are never listed: before the i-th active one lie indices[i] - i of them.
        """
        gaps = self.indices
        gaps -= torch.arange(self.active, device=gaps.device)
        ranks = ranks.to(gaps.device)
        return ranks + torch.searchsorted(gaps, ranks, right=True)

    def to(self, device: torch.device) -> Topology:
        """The same topology on `device`."""
        if self._starts is None or self._columns is None or self.device == device:
            return self
        return Topology.trusted(self.shape, self._starts.to(device), self._columns.to(device), self.unit)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Topology):
            return NotImplemented
        if self is other:
            return True
        if (self.shape, self.unit, self.active) != (other.shape, other.unit, other.active):
            return False
        return self.is_dense or (
            torch.equal(self.starts.cpu(), other.starts.cpu()) and torch.equal(self.columns.cpu(), other.columns.cpu())
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        unit = "" if self.is_unstructured else f", unit={self.unit}"
        return f"Topology(shape={self.shape}, nnz={self.nnz:,}, density={self.density:.4g}{unit})"


def _ascend(positions: Tensor) -> bool:
    """Whether each is larger than the one before; compared, since differences of huge numbers wrap around."""
    return bool((positions[1:] > positions[:-1]).all())


def fan_in_scale(topology: Topology, out_axis: int = 0) -> Tensor:
    """sqrt(fan-in of the dense weight / active fan-in of the same output) at each active entry, (nnz,).

    Values drawn for the dense weight and multiplied by this keep the variance of every output that is connected.

    Source: Evci et al. 2022, Gradient Flow in Sparse Neural Networks and How Lottery Tickets Win, section 3.1: each
    neuron is initialized by the number of connections it has.
    """
    outputs = topology.entries
    outputs //= math.prod(topology.shape[out_axis + 1 :])
    outputs %= topology.shape[out_axis]
    active = torch.bincount(outputs, minlength=topology.shape[out_axis])
    return (topology.numel / topology.shape[out_axis] / active[outputs].double()).sqrt()
