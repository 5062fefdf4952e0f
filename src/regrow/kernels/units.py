"""What the kernels read of a topology of units: boxes of entries that are active or inactive together."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from regrow.core.text import by
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


def has_kernels(topology: Topology, groups: int = 1) -> bool:
    """Whether products run on units themselves: those of a matrix.

    A weight of more axes is the matrix (rows, everything behind them), in which a unit is some rows of one column. Of a
    convolution of several `groups`, no unit may span two.
    """
    return not topology.is_unstructured and _is_matrix(topology) and topology.shape[0] // groups % topology.unit[0] == 0


def _is_matrix(topology: Topology) -> bool:
    """Whether units stand in rows and columns: those of a matrix, and those of several filters at one tap."""
    return len(topology.shape) == 2 or max(topology.unit[1:], default=0) == 1


def unit_index(topology: Topology) -> UnitIndex:
    """The index of a topology that `has_kernels`, in O(1): it shares the memory of one that is not dense.

    Raises:
        ValueError: when the units of a weight of more axes reach along several of them.

    Examples:
        >>> import torch
        >>> found = unit_index(Topology((16, 6), torch.tensor([1, 2, 4]), unit=(8, 2)))
        >>> found.rows, found.cols, found.units, found.nnz
        (16, 6, 3, 48)
        >>> found = unit_index(Topology((16, 4, 3, 3), torch.tensor([5, 40]), unit=(8, 1, 1, 1)))
        >>> found.rows, found.cols, found.columns.tolist()
        (16, 36, [5, 4])
    """
    if not _is_matrix(topology):
        raise ValueError(
            f"there are kernels for units of matrices and of filters that share one tap, and a weight of shape "
            f"{topology.shape} has units of {by(topology.unit)}"
        )
    outputs, *inputs = topology.unit
    return UnitIndex(topology.starts, topology.columns, math.prod(topology.shape[1:]), outputs, math.prod(inputs))
