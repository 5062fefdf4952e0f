"""The shape of a convolution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

Pair = tuple[int, int]


class Geometry(NamedTuple):
    """What a two-dimensional convolution is besides its values; one of a single dimension has height 1.

    A weight (out, in / groups, height, width) is the matrix (out, in / groups * height * width).
    """

    kernel: Pair
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1

    @classmethod
    def from_ints(cls, numbers: Sequence[int]) -> Geometry:
        """The inverse of `ints`."""
        kernel, stride, padding, dilation = ((numbers[i], numbers[i + 1]) for i in range(0, 8, 2))
        return cls(kernel, stride, padding, dilation, numbers[8])

    @property
    def ints(self) -> list[int]:
        """All numbers in order, as an operator's argument."""
        return [*self.kernel, *self.stride, *self.padding, *self.dilation, self.groups]

    def output(self, height: int, width: int) -> Pair:
        """Height and width of the output of an input (height, width)."""
        sizes = [
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, k, s, p, d in zip(
                (height, width), self.kernel, self.stride, self.padding, self.dilation, strict=True
            )
        ]
        return sizes[0], sizes[1]

    def smallest(self, height: int, width: int) -> Pair:
        """Height and width of the smallest input that has an output (height, width)."""
        sizes = [
            (n - 1) * s - 2 * p + d * (k - 1) + 1
            for n, k, s, p, d in zip(
                (height, width), self.kernel, self.stride, self.padding, self.dilation, strict=True
            )
        ]
        return sizes[0], sizes[1]
