"""Drop and grow as recipes take it: any drop, growth and redistribution, with what the method then needs."""

from __future__ import annotations

from typing import NamedTuple

from regrow.core.checks import require_choice
from regrow.parts import (
    Drop,
    Growth,
    Need,
    Observer,
    Regrow,
    Schedule,
    Statistic,
    Update,
    drop_and_grow,
    keep_momentum,
    needs_of,
)


class DropGrow(NamedTuple):
    """An update that drops and grows, and what it takes to run it."""

    update: Update
    needs: Need
    observe: Observer | None


class Reads(NamedTuple):
    """What a method needs for a growth and a redistribution, and the observer that keeps the mean they read, if any."""

    needs: Need
    observe: Observer | None


def reads(name: str, grow: Growth | None, redistribute: Statistic | None, decay: float | None) -> Reads:
    """What `grow` and `redistribute` read; `decay` is of the running mean, None means 0.9.

    Raises:
        ValueError: when `decay` lies outside [0, 1), or is given where nothing reads a running mean.
    """
    needs = needs_of(grow, redistribute)
    observes = Need.EVERY_GRADIENT in needs
    if decay is not None and not observes:
        raise ValueError(
            f"{name}: decay is of a running mean of gradients, which neither growth nor redistribution reads: leave "
            f"out {decay:g}"
        )
    if decay is not None and not 0 <= decay < 1:
        raise ValueError(f"{name}: decay must lie in [0, 1), got {decay:g}")
    if redistribute is not None:
        needs |= Need.ROOM
    return Reads(needs, keep_momentum(0.9 if decay is None else decay) if observes else None)


def drop_grow(
    name: str,
    fraction: Schedule,
    drop: Drop,
    grow: Growth,
    redistribute: Statistic | None,
    decay: float | None,
    regrow_dropped: Regrow,
) -> DropGrow:
    """`drop_and_grow` with what it needs.

    Raises:
        ValueError: when an option is out of its range, naming the method.
    """
    require_choice(name, "regrow_dropped", regrow_dropped, ("keep", "reset", "forbid"))
    found = reads(name, grow, redistribute, decay)
    return DropGrow(drop_and_grow(fraction, drop, grow, redistribute, regrow_dropped), *found)
