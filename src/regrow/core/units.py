"""Units: boxes of entries that are active or inactive together. An entry by itself is the box of size 1.

A weight of `shape` is divided into boxes of size `unit` along its axes, which form a grid. Where the sizes do not
divide, the last boxes along an axis are smaller. Within a box the entries stand with the first axis fastest, as the
kernels store them: what one input sends to all outputs of its unit lies side by side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Pool = Callable[[Tensor, Tensor | None], Tensor]
"""How the numbers of a unit's entries become one: (numbers (n, size), which of them exist, bool (n, size)) -> (n,).

None says that all exist."""


def mean(numbers: Tensor, there: Tensor | None) -> Tensor:
    """The mean of each unit, (n,) float64; a `Pool`.

    In float64, so that the order of a sum does not decide a near tie.
    """
    if there is None:
        return numbers.sum(1, dtype=torch.float64) / numbers.shape[1]
    return numbers.double().masked_fill(~there, 0.0).sum(1) / there.sum(1)


def root_mean_square(numbers: Tensor, there: Tensor | None) -> Tensor:
    """The root of the mean square of each unit, (n,) float64; a `Pool` for numbers that are not negative.

    It ranks units of one size as their l2 norm does.
    """
    return mean(numbers.double().square(), there).sqrt()


def largest(numbers: Tensor, there: Tensor | None) -> Tensor:
    """The largest of each unit, (n,); a `Pool`."""
    return (numbers if there is None else numbers.masked_fill(~there, -math.inf)).amax(1)


def grid(shape: Sequence[int], unit: Sequence[int]) -> tuple[int, ...]:
    """How many units lie along each axis.

    Examples:
        >>> grid((300, 784), (8, 1))
        (38, 784)
    """
    return tuple(-(-size // step) for size, step in zip(shape, unit, strict=True))


def divides(shape: Sequence[int], unit: Sequence[int]) -> bool:
    """Whether all units of a weight have the same size."""
    return all(size % step == 0 for size, step in zip(shape, unit, strict=True))


def entries(shape: Sequence[int], unit: Sequence[int], places: Tensor) -> tuple[Tensor, Tensor | None]:
    """The flat positions of all entries of the units at the flat grid positions `places` (n,).

    Returns:
        (n, size of a unit) int64, and which of them exist (None where all do).

    Examples:
        >>> entries((4, 3), (2, 1), torch.tensor([1, 3]))[0].tolist()
        [[1, 4], [6, 9]]
        >>> at, there = entries((3, 2), (2, 1), torch.tensor([2]))
        >>> at[there].tolist()
        [4]
    """
    # One column for each entry of a box, the first axis fastest.
    inside = torch.cartesian_prod(*(torch.arange(step, device=places.device) for step in reversed(unit)))
    inside = inside.view(-1, len(unit)).flip(1)
    at = places.new_zeros(places.numel(), len(inside))
    there = None if divides(shape, unit) else torch.ones_like(at, dtype=torch.bool)
    rest, stride = places, 1
    steps = list(zip(shape, unit, grid(shape, unit), inside.unbind(1), strict=True))
    for size, step, number, local in reversed(steps):
        along = (rest % number * step)[:, None] + local
        at += along * stride
        if there is not None:
            there &= along < size
        rest, stride = rest // number, stride * size
    return at, there


def by_unit(shape: Sequence[int], unit: Sequence[int], values: Tensor) -> tuple[Tensor, Tensor | None]:
    """`values` of all entries of whole rows of units, (rows * row size,), unit by unit: (units, size of a unit).

    Args:
        shape: of the weight.
        unit: size along each axis.
        values: of as many leading rows as there are, a multiple of unit[0] unless they end with the weight.

    Returns:
        A copy, or a view where a unit is an entry, in the order of the grid, and which exist (None where all do).

    Examples:
        >>> by_unit((4, 2), (2, 1), torch.arange(8))[0].tolist()
        [[0, 2], [1, 3], [4, 6], [5, 7]]
    """
    rows = values.numel() // max(1, math.prod(shape[1:]))
    part = (rows, *shape[1:])
    if divides(part, unit):
        return _boxes(values.view(part), unit), None
    whole = [step * number for step, number in zip(unit, grid(part, unit), strict=True)]
    padded, there = values.new_zeros(whole), torch.zeros(whole, dtype=torch.bool, device=values.device)
    region = tuple(slice(size) for size in part)
    padded[region], there[region] = values.view(part), True
    return _boxes(padded, unit), _boxes(there, unit)


def _boxes(values: Tensor, unit: Sequence[int]) -> Tensor:
    n = len(unit)
    split = values.reshape([k for size, step in zip(values.shape, unit, strict=True) for k in (size // step, step)])
    return split.permute(*range(0, 2 * n, 2), *range(2 * n - 1, 0, -2)).reshape(-1, math.prod(unit))
