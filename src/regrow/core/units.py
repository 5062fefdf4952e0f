"""Units: boxes of entries that are active or inactive together. An entry by itself is the box of size 1.

A weight of `shape` is divided into boxes of size `unit` along its axes, which form a grid. All are of one size. Within
a box the entries stand with the first axis fastest, as the kernels store them: what one input sends to all outputs of
its unit lies side by side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Pool = Callable[[Tensor], Tensor]
"""How the numbers of a unit's entries become one: (n, size) -> (n,)."""


def mean(numbers: Tensor) -> Tensor:
    """The mean of each unit, (n,) float64; a `Pool`.

    In float64, so that the order of a sum does not decide a near tie.
    """
    return numbers.sum(1, dtype=torch.float64) / numbers.shape[1]


def root_mean_square(numbers: Tensor) -> Tensor:
    """The root of the mean square of each unit, (n,) float64; a `Pool` for numbers that are not negative.

    It ranks units of one size as their l2 norm does.
    """
    return mean(numbers.double().square()).sqrt()


def largest(numbers: Tensor) -> Tensor:
    """The largest of each unit, (n,); a `Pool`."""
    return numbers.amax(1)


def entries(shape: Sequence[int], unit: Sequence[int], places: Tensor) -> Tensor:
    """The flat positions of all entries of the units at the flat grid positions `places` (n,), (n, size of a unit).

    Examples:
        >>> entries((4, 3), (2, 1), torch.tensor([1, 3])).tolist()
        [[1, 4], [6, 9]]
    """
    # One column for each entry of a box, the first axis fastest.
    inside = torch.zeros(1, dtype=torch.int64, device=places.device)
    base, rest, stride = torch.zeros_like(places), places, 1
    for size, step in reversed(list(zip(shape, unit, strict=True))):
        number = max(1, size // step)
        base += rest % number * (step * stride)
        inside = (inside[:, None] + torch.arange(step, device=places.device) * stride).view(-1)
        rest, stride = rest // number, stride * size
    return base[:, None] + inside


def by_unit(shape: Sequence[int], unit: Sequence[int], values: Tensor) -> Tensor:
    """`values` of all entries of whole rows of units, (rows * row size,), unit by unit: (units, size of a unit).

    Args:
        shape: of the weight.
        unit: size along each axis.
        values: of as many leading rows as there are, a multiple of unit[0].

    Examples:
        >>> by_unit((4, 2), (2, 1), torch.arange(8)).tolist()
        [[0, 2], [1, 3], [4, 6], [5, 7]]
    """
    rows, n = values.numel() // max(1, math.prod(shape[1:])), len(unit)
    split = values.reshape(
        [k for size, step in zip((rows, *shape[1:]), unit, strict=True) for k in (size // step, step)]
    )
    return split.permute(*range(0, 2 * n, 2), *range(2 * n - 1, 0, -2)).reshape(-1, math.prod(unit))


def by_index(shape: Sequence[int], axis: int, values: Tensor) -> Tensor:
    """`values` (numel,) of a weight or grid of `shape` by their index along an axis, (size of it, others), a copy."""
    return values.view(tuple(shape)).movedim(axis, 0).reshape(shape[axis], -1)


def from_index(shape: Sequence[int], axis: int, values: Tensor) -> Tensor:
    """The inverse of `by_index`: (size of the axis, others) -> (numel,).

    Examples:
        >>> by_index((2, 3), 1, torch.arange(6)).tolist()
        [[0, 3], [1, 4], [2, 5]]
        >>> from_index((2, 3), 1, by_index((2, 3), 1, torch.arange(6))).tolist()
        [0, 1, 2, 3, 4, 5]
    """
    others = [size for a, size in enumerate(shape) if a != axis]
    return values.view(shape[axis], *others).movedim(0, axis).reshape(-1)


def in_rows(shape: Sequence[int], unit: Sequence[int], values: Tensor) -> Tensor:
    """The inverse of `by_unit` for a whole weight: (units, size of a unit) -> the weight's shape.

    Examples:
        >>> in_rows((4, 2), (2, 1), by_unit((4, 2), (2, 1), torch.arange(8))).view(-1).tolist()
        [0, 1, 2, 3, 4, 5, 6, 7]
    """
    n, grid = len(unit), [size // step for size, step in zip(shape, unit, strict=True)]
    split = values.reshape(*grid, *reversed(unit))
    return split.permute([k for axis in range(n) for k in (axis, 2 * n - 1 - axis)]).reshape(tuple(shape))
