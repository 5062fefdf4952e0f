"""Modules that hold only the active entries of their weights."""

from regrow.nn.base import SparseModule as SparseModule
from regrow.nn.conv import SparseConv1d as SparseConv1d
from regrow.nn.conv import SparseConv2d as SparseConv2d
from regrow.nn.linear import SparseConv1D as SparseConv1D
from regrow.nn.linear import SparseLinear as SparseLinear
