"""Matrices made of units, by views: an oracle of its own for what the library calls units."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from regrow import Topology
from regrow.kernels import UnitIndex
from regrow.kernels import unit_index as index_of


class Unit(NamedTuple):
    """`outputs` rows x `inputs` columns."""

    outputs: int
    inputs: int = 1

    def split(self, matrix: Tensor) -> Tensor:
        """A view of `matrix` (rows, cols) by units: (rows / outputs, cols / inputs, inputs, outputs)."""
        rows, cols = (size // step for size, step in zip(matrix.shape, self, strict=True))
        return matrix.view(rows, self.outputs, cols, self.inputs).permute(0, 2, 3, 1)

    def join(self, units: Tensor) -> Tensor:
        """The matrix of which `units` is the `split`."""
        rows, cols, inputs, outputs = units.shape
        return units.permute(0, 3, 1, 2).reshape(rows * outputs, cols * inputs)


def of_grid(grid: Topology, unit: Unit) -> Topology:
    """The topology of a matrix whose grid of units is active where `grid`, of entries, is."""
    rows, cols = (size * step for size, step in zip(grid.shape, unit, strict=True))
    return Topology((rows, cols), grid.positions, tuple(unit))


def unit_index(grid: Topology, unit: Unit) -> UnitIndex:
    """What the kernels read of `of_grid`."""
    return index_of(of_grid(grid, unit))
