"""Density or drop fraction over optimizer steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """A number for every optimizer step, with the step at which it stops changing.

    Args:
        value: step -> number.
        until: the step from which the value is constant; None when it never changes.
    """

    value: Callable[[int], float]
    until: int | None = None

    def __call__(self, step: int) -> float:
        """The value at optimizer step `step`."""
        return self.value(step)


Anneal = Callable[[float, int, int], Schedule]
"""How a number moves over training: (first value, until, begin) -> schedule."""


def constant(value: float, until: int | None = None, begin: int = 0) -> Schedule:
    """`value` at every step; `until` and `begin` only mark the span, as for the other schedules."""
    _span(until if until is not None else begin + 1, begin)
    return Schedule(lambda step: value, until)


def linear(value: float, until: int, begin: int = 0) -> Schedule:
    """value (1 - p), with p = (step - begin) / (until - begin) clipped to [0, 1]."""
    return inverse_power(value, until, begin, power=1)


def cosine(value: float, until: int, begin: int = 0) -> Schedule:
    """value / 2 (1 + cos(pi p)), with p = (step - begin) / (until - begin) clipped to [0, 1].

    Source: Evci et al. 2020, Rigging the Lottery, section 3, (2) Update schedule. With a `begin` the paper's code
    reaches zero `begin` steps early; here p is shifted, so that the value at `until` is 0 in any case.

    Examples:
        >>> cosine(0.3, until=25_000)(12_500)
        0.15
    """
    span = _span(until, begin)
    return Schedule(lambda step: value / 2 * (1 + math.cos(math.pi * _progress(step, begin, span))), until)


def cosine_to(last: float) -> Anneal:
    """A cosine that ends at `last`: (value, until, begin) -> last + (value - last) / 2 (1 + cos(pi p)).

    A value that lies below `last` stays as it is, so that a schedule never rises.

    Args:
        last: the value from `until` on, at least 0.

    Raises:
        ValueError: when `last` is negative.

    Source: Liu et al. 2021, Sparse Training via Boosting Pruning Plasticity with Neuroregeneration, its code, and that
    of Dettmers and Zettlemoyer 2019, where `last` is 0.005.

    Examples:
        >>> schedule = cosine_to(0.005)(0.5, 1000, 0)
        >>> [round(schedule(step), 4) for step in (250, 500, 750, 1000)]
        [0.4275, 0.2525, 0.0775, 0.005]
    """
    if not last >= 0:
        raise ValueError(f"cosine_to: the last value must be at least 0, got {last:g}")

    def make(value: float, until: int, begin: int = 0) -> Schedule:
        floor = min(last, value)
        above = cosine(value - floor, until, begin)
        return Schedule(lambda step: floor + above(step), until)

    return make


cosine_to_half_percent: Anneal = cosine_to(0.005)
"""A cosine that ends at 0.005, as in the codes of SNFS, ITOP and GraNet."""


def inverse_power(value: float, until: int, begin: int = 0, power: float = 3) -> Schedule:
    """value (1 - p)^power, with p = (step - begin) / (until - begin) clipped to [0, 1].

    Source: Evci et al. 2020, Rigging the Lottery, appendix G (k = 1 linear, k = 3 inverse power).
    """
    span = _span(until, begin)
    return Schedule(lambda step: value * (1 - _progress(step, begin, span)) ** power, until)


def cubic(first: float, last: float, until: int, begin: int = 0) -> Schedule:
    """last + (first - last) (1 - p)^3, with p = (step - begin) / (until - begin) clipped to [0, 1].

    Source: Zhu and Gupta 2017, To prune, or not to prune, equation 1, written for densities.
    """
    span = _span(until, begin)
    return Schedule(lambda step: last + (first - last) * (1 - _progress(step, begin, span)) ** 3, until)


def _span(until: int, begin: int) -> int:
    if begin < 0 or until <= begin:
        raise ValueError(f"a schedule must end after it begins, at step 0 or later: begin is {begin}, until is {until}")
    return until - begin


def _progress(step: int, begin: int, span: int) -> float:
    return min(max((step - begin) / span, 0.0), 1.0)
