"""DSR."""

from __future__ import annotations

import math

from regrow.methods.dynamic.composition import dynamic_method
from regrow.methods.recipe import recipe
from regrow.parts import (
    Allocation,
    Growth,
    Method,
    Regrow,
    Statistic,
    Timing,
    Units,
    adaptive_threshold,
    at_random,
    constant,
    survivors,
    uniform,
)


@recipe
def dsr(  # noqa: PLR0913 - every part of the update but the drop is an option
    density: float | None,
    *,
    until: int,
    begin: int | None = None,
    interval: int = 100,
    fraction: float = 0.1,
    threshold: float = 1e-3,
    tolerance: float = 0.1,
    grow: Growth = at_random,
    redistribute: Statistic | None = survivors,
    decay: float | None = None,
    allocate: Allocation = uniform,
    regrow_dropped: Regrow = "reset",
    timing: Timing = "after",
    structure: Units | None = None,
) -> Method:
    """DSR: drop what lies under one threshold for all weights, grow at random where most entries survived.

    Args:
        fraction: share of active entries that each update should drop, in [0, 1]; the threshold follows it.
        threshold: on |w| at the first update, above 0.
        tolerance: how far off that count may be before the threshold is doubled or halved, in [0, 1).

    Source: Mostafa and Wang 2019, Parameter Efficient Training of Deep Convolutional Neural Networks by Dynamic Sparse
    Reparameterization, Algorithm 1. The paper's target is a number of entries (20,000 for WRN-28-2), here a share of
    those that are active; its interval begins at 100 steps and grows up to 800. What a weight has no room for goes to
    the others in proportion. The code repeats and rounds until all are placed, and forbids entries that were dropped in
    the same update.

    Examples:
        >>> dsr(0.1, until=350).needs
        <Need.ROOM: 16>
    """
    if not 0 < threshold < math.inf or not 0 <= tolerance < 1:
        raise ValueError(
            f"dsr: threshold must lie above 0 and tolerance in [0, 1), got threshold {threshold:g}, tolerance "
            f"{tolerance:g}"
        )
    return dynamic_method(
        "dsr",
        density,
        until=until,
        begin=begin,
        interval=interval,
        fraction=fraction,
        anneal=lambda value, until, begin: constant(value),
        drop=adaptive_threshold(threshold, tolerance),
        grow=grow,
        redistribute=redistribute,
        decay=decay,
        allocate=allocate,
        regrow_dropped=regrow_dropped,
        timing=timing,
        structure=structure,
    )
