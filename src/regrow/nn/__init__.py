"""Modules that hold only the active entries of their weights."""

from torch import nn

from regrow.nn.base import Init as Init
from regrow.nn.base import SparseModule as SparseModule
from regrow.nn.base import fan_in_scale as fan_in_scale
from regrow.nn.conv import SparseConv1d as SparseConv1d
from regrow.nn.conv import SparseConv2d as SparseConv2d
from regrow.nn.linear import SparseConv1D as SparseConv1D
from regrow.nn.linear import SparseLinear as SparseLinear

SPARSE: dict[type[nn.Module], type[SparseModule]] = {
    nn.Linear: SparseLinear,
    nn.Conv1d: SparseConv1d,
    nn.Conv2d: SparseConv2d,
}
"""Dense classes and the sparse ones that stand for them."""


def sparse_class(module: nn.Module) -> type[SparseModule] | None:
    """The class that `module` has in compressed storage; None where there is none."""
    for dense, sparse in SPARSE.items():
        if isinstance(module, dense) and type(module).forward is dense.forward:
            return sparse
    return None
