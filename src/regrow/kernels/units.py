"""What the kernels read of a topology of units: boxes of entries that are active or inactive together."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from regrow.core.topology import Topology


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


def has_kernels(topology: Topology) -> bool:
    """Whether products run on units themselves: those of a matrix."""
    return not topology.is_unstructured and len(topology.shape) == 2


def unit_index(topology: Topology) -> UnitIndex:
    """The index of a topology that `has_kernels`, in O(1): it shares the memory of one that is not dense.

    Raises:
        ValueError: when the weight is no matrix.

    Examples:
        >>> import torch
        >>> found = unit_index(Topology((16, 6), torch.tensor([1, 2, 4]), unit=(8, 2)))
        >>> found.rows, found.cols, found.units, found.nnz
        (16, 6, 3, 48)
    """
    if len(topology.shape) != 2:
        raise ValueError(f"there are kernels for units of matrices, and a weight has shape {topology.shape}")
    outputs, inputs = topology.unit
    return UnitIndex(topology.starts, topology.columns, topology.shape[1], outputs, inputs)
