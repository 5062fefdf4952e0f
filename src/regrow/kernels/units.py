"""Units, entries of a weight that are active or inactive together, and what the kernels read of a topology of them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from regrow.core.topology import Topology


class Unit(NamedTuple):
    """`outputs` consecutive rows x `inputs` consecutive columns of a weight, all active or none.

    The units of a weight (rows, cols) are the entries of its grid (rows / outputs, cols / inputs). Which of them are
    active is a `Topology` of the grid.
    """

    outputs: int
    """Consecutive rows."""
    inputs: int = 1
    """Consecutive columns."""

    def grid(self, rows: int, cols: int) -> tuple[int, int]:
        """The shape of the grid of units of a weight (rows, cols).

        Raises:
            ValueError: when the unit does not divide the weight.

        Examples:
            >>> Unit(8).grid(304, 784)
            (38, 784)
            >>> Unit(8).grid(300, 784)
            Traceback (most recent call last):
            ...
            ValueError: units of 8 x 1 do not divide a weight of 300 x 784: its rows must be a multiple of 8 and its \
columns of 1
        """
        if min(self) < 1:
            raise ValueError(f"a unit has at least 1 output and 1 input, got {self.outputs} x {self.inputs}")
        if rows % self.outputs or cols % self.inputs:
            raise ValueError(
                f"units of {self.outputs} x {self.inputs} do not divide a weight of {rows:,} x {cols:,}: its rows must "
                f"be a multiple of {self.outputs} and its columns of {self.inputs}"
            )
        return rows // self.outputs, cols // self.inputs

    def split(self, matrix: Tensor) -> Tensor:
        """A view of `matrix` (rows, cols) by units: (rows / outputs, cols / inputs, inputs, outputs).

        Within a unit the entries stand as its values are stored, so indexing with the mask of a grid gives values.

        Raises:
            ValueError: when the unit does not divide the matrix.

        Examples:
            >>> import torch
            >>> weight = torch.arange(8).view(4, 2)
            >>> Unit(2).split(weight)[torch.tensor([[True, False], [False, True]])]
            tensor([[[0, 2]],
            <BLANKLINE>
                    [[5, 7]]])
        """
        rows, cols = self.grid(*matrix.shape)
        return matrix.view(rows, self.outputs, cols, self.inputs).permute(0, 2, 3, 1)

    def join(self, units: Tensor) -> Tensor:
        """The matrix (rows, cols) of which `units` is the `split`.

        Examples:
            >>> import torch
            >>> weight = torch.arange(8).view(4, 2)
            >>> torch.equal(Unit(2).join(Unit(2).split(weight)), weight)
            True
        """
        rows, cols, inputs, outputs = units.shape
        return units.permute(0, 3, 1, 2).reshape(rows * outputs, cols * inputs)


class UnitIndex(NamedTuple):
    """A topology of units seen as a matrix (rows, cols): 4 bytes per unit, and nothing for its transpose.

    The values that belong to it are (capacity, inputs, outputs), one unit after the other as they stand here: what one
    input sends to all outputs of its unit lies side by side.
    """

    starts: Tensor
    """(rows / outputs + 1,) int64: where each row of units begins among the units."""
    columns: Tensor
    """(units,) int32, or int64 where a row has more units than that: the column of each, counted in units."""
    cols: int
    """Columns of the matrix."""
    outputs: int
    """Rows of the matrix that a unit spans."""
    inputs: int
    """Columns of the matrix that a unit spans."""

    @property
    def unit(self) -> Unit:
        """What is active or inactive together."""
        return Unit(self.outputs, self.inputs)

    @property
    def rows(self) -> int:
        """Rows of the matrix."""
        return (self.starts.numel() - 1) * self.outputs

    @property
    def units(self) -> int:
        """Active units."""
        return self.columns.numel()

    @property
    def nnz(self) -> int:
        """Active entries."""
        return self.units * self.outputs * self.inputs


def unit_index(grid: Topology, unit: Unit) -> UnitIndex:
    """The index of a topology of units, in O(1): it shares the memory of a `grid` that is not dense.

    Args:
        grid: (rows / outputs, cols / inputs) of the weight, as `Unit.grid` says.
        unit: what one entry of the grid stands for.

    Examples:
        >>> import torch
        >>> found = unit_index(Topology((2, 3), torch.tensor([1, 2, 4])), Unit(8, 2))
        >>> found.rows, found.cols, found.units, found.nnz
        (16, 6, 3, 48)
    """
    return UnitIndex(grid.starts, grid.columns, grid.row_size * unit.inputs, unit.outputs, unit.inputs)
