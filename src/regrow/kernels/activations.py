"""Inputs and output gradients that a step leaves behind, from which the gradient at every position can be had."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from regrow.kernels.geometry import Geometry

_keys = itertools.count(1)
_keepers: weakref.WeakValueDictionary[int, Keeper] = weakref.WeakValueDictionary()


class Operands(NamedTuple):
    """What one product left behind: x (batch, cols) and dy (batch, rows), or those of a convolution."""

    x: Tensor
    dy: Tensor
    geometry: Geometry | None


class Keeper:
    """Keeps what the value gradients of one weight read, while its `key` is handed to their operators.

    Args:
        allow: called with the bytes about to be kept; raises where they are too many.
    """

    def __init__(self, allow: Callable[[int], None]) -> None:
        self.key = next(_keys)
        self.kept: list[Operands] = []
        """Copies, in the order of the backward passes."""
        self.allow = allow
        _keepers[self.key] = self

    @property
    def nbytes(self) -> int:
        """Bytes kept."""
        return sum(o.x.nbytes + o.dy.nbytes for o in self.kept)

    def rows(self, low: int, high: int, cols: int, dtype: torch.dtype | None = None) -> Tensor:
        """Rows [low, high) of the gradient of the whole weight, (high - low, cols): the sum over all that is kept.

        Each part is rounded to the type of its operands, their sum to `dtype`, which None takes from the first.
        """
        total: Tensor | None = None
        for x, dy, geometry in self.kept:
            part = dy[:, low:high].t() @ x if geometry is None else _conv_rows(x, dy, geometry, low, high)
            total = part.to(dtype) if total is None else total.add_(part)
        assert total is not None
        return total.reshape(high - low, cols)


def keep(key: int, x: Tensor, dy: Tensor, geometry: Geometry | None = None) -> None:
    """Hand x and dy to the keeper of `key`; 0 is nobody."""
    keeper = _keepers.get(key) if key else None
    if keeper is not None:
        keeper.allow(x.nbytes + dy.nbytes)
        # Copies, since compiled programs reuse the memory of what they have read.
        keeper.kept.append(Operands(x.detach().clone(), dy.detach().clone(), geometry))


def _conv_rows(x: Tensor, dy: Tensor, geometry: Geometry, low: int, high: int) -> Tensor:
    """(high - low, C / groups * KH * KW): the gradient of some output channels of a convolution's weight."""
    per_group, channels = dy.shape[1] // geometry.groups, x.shape[1] // geometry.groups
    parts = []
    for group, first, last in _by_group(low, high, per_group):
        inner = x[:, group * channels : (group + 1) * channels]
        shape = (last - first, channels, *geometry.kernel)
        parts.append(_conv_weight(inner, dy[:, first:last], shape, geometry).reshape(last - first, -1))
    return torch.cat(parts)


def _by_group(low: int, high: int, size: int) -> Iterator[tuple[int, int, int]]:
    """(group, first, last) of the parts of [low, high) that lie in one group of `size` each."""
    for group in range(low // size, -(-high // size)):
        yield group, max(low, group * size), min(high, (group + 1) * size)


def _conv_weight(x: Tensor, dy: Tensor, shape: tuple[int, ...], geometry: Geometry) -> Tensor:
    stride, padding, dilation = list(geometry.stride), list(geometry.padding), list(geometry.dilation)
    weight = x.new_empty(1).expand(shape)
    grads = torch.ops.aten.convolution_backward(
        dy, x, weight, None, stride, padding, dilation, False, [0, 0], 1, [False, True, False]
    )
    gradient: Tensor = grads[1]
    return gradient
