"""What every part of the library may know of a sparsified weight, whatever its storage."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, overload

from torch import Tensor

from regrow.core.draws import Stream
from regrow.core.topology import Topology
from regrow.core.units import Pool


class SparseWeight(Protocol):
    """One weight, or one block of a packed weight, some of whose entries are active.

    The order of all (nnz,) tensors follows `topology.entries`.
    """

    name: str
    """Canonical parameter name; blocks of a packed weight end in [0], [1], ..."""
    shape: tuple[int, ...]
    out_axis: int
    in_axis: int
    pool: Pool
    """How the scores of a unit's entries become one."""
    generator: Stream
    """The draws of the current step."""
    state: dict[str, Tensor]
    """What observers keep, saved with the sparsifier."""

    @property
    def topology(self) -> Topology:
        """What is active."""
        ...

    @property
    def has_grad(self) -> bool:
        """Whether the last backward reached this weight."""
        ...

    def values(self) -> Tensor:
        """Active values, (nnz,)."""
        ...

    def set_values(self, values: Tensor) -> None:
        """Replace the active values by `values` (nnz,)."""
        ...

    def grads(self) -> Tensor:
        """Gradients of the loss at the active entries, (nnz,)."""
        ...

    def grad_blocks(self) -> Iterator[tuple[int, Tensor]]:
        """The gradient of the loss at every entry, as (first flat position, block (n,)) in ascending order.

        Blocks are made of whole rows of units.
        """
        ...

    def grads_at(self, positions: Tensor) -> Tensor:
        """The gradient of the loss at the entries of the units at ascending `positions` (n,), active or not.

        It costs what these entries cost: one number for each, in the order of `Topology.entries_of`.
        """
        ...

    def rewire(self, topology: Topology) -> None:
        """Change the topology: survivors keep value and optimizer state, newcomers start at zero."""
        ...

    def restore(self, topology: Topology) -> None:
        """Take on a saved topology; values and optimizer state are already those that were saved with it."""
        ...


class Sized(Protocol):
    """As much of a weight as an allocation from shapes alone may read."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def topology(self) -> Topology: ...
    @property
    def out_axis(self) -> int: ...
    @property
    def in_axis(self) -> int: ...


@dataclass(frozen=True)
class Shaped:
    """A weight of which only name and shape are known; every entry is active."""

    name: str
    shape: tuple[int, ...]
    topology: Topology
    out_axis: int = 0
    in_axis: int = 1


@dataclass(frozen=True)
class Weights(Sequence[SparseWeight]):
    """The sparsified weights of one model in order, with the budget they share.

    Args:
        items: the weights.
        outside_numel: entries that count in the budget without being among `items`.
        outside_nnz: how many of those are active.
    """

    items: tuple[SparseWeight, ...]
    outside_numel: int = 0
    outside_nnz: int = 0

    @overload
    def __getitem__(self, index: int) -> SparseWeight: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[SparseWeight]: ...
    def __getitem__(self, index: int | slice) -> SparseWeight | Sequence[SparseWeight]:
        return self.items[index]

    def __len__(self) -> int:
        return len(self.items)

    @property
    def numel(self) -> int:
        """Entries of all weights, active or not."""
        return sum(w.topology.numel for w in self.items)

    @property
    def nnz(self) -> int:
        """Active entries of all weights."""
        return sum(w.topology.nnz for w in self.items)

    def total(self, density: float) -> int:
        """How many entries are active at `density`: floor(density (S + E) + 1/2) - A.

        S entries belong to these weights; E (`outside_numel`) count in the budget besides, A (`outside_nnz`) of
        them active. This is the one place where a density becomes a count.

        Raises:
            ValueError: when the entries outside alone exceed the budget.
        """
        budget = self.numel + self.outside_numel
        total = math.floor(density * budget + 0.5) - self.outside_nnz
        if total < 0:
            raise ValueError(
                f"density {density:g} of {budget:,} entries leaves no room beside the {self.outside_nnz:,} that stay "
                f"active outside the {self.numel:,} sparsified ones: the least feasible density is "
                f"{self.outside_nnz / budget:.6g}"
            )
        return min(total, self.numel)

    def require(self, density: float | None) -> None:
        """Raise ValueError when `density` is infeasible or leaves no entry active; None is left to an allocation."""
        if density is not None and self.total(density) == 0:
            budget = self.numel + self.outside_numel
            raise ValueError(
                f"density {density:g} of {budget:,} entries makes none of the {self.numel:,} sparsified ones active: "
                f"the least density that does is {(self.outside_nnz + 1) / budget:.6g}"
            )
