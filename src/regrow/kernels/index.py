"""What the kernels read of a topology: its rows, its columns, and the way between them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Index(NamedTuple):
    """A topology seen as a matrix (rows, cols), rows being the first axis of the weight, and as its transpose.

    `columns`, `t_rows` and `order` are int32, or all int64 where one of them needs it: 12 bytes per active entry.
    """

    starts: Tensor
    """(rows + 1,) int64: where each row begins among the values."""
    columns: Tensor
    """(nnz,) the column of each value."""
    t_starts: Tensor
    """(cols + 1,) int64: where each column begins among the values in transposed order."""
    t_rows: Tensor
    """(nnz,) the row of each value in transposed order."""
    order: Tensor
    """(nnz,) where each value in transposed order stands among the values."""

    @property
    def rows(self) -> int:
        """Rows of the matrix."""
        return self.starts.numel() - 1

    @property
    def cols(self) -> int:
        """Columns of the matrix."""
        return self.t_starts.numel() - 1

    @property
    def nnz(self) -> int:
        """Active entries."""
        return self.columns.numel()
