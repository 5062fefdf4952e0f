"""What the family is made of: a random start, and a drop-and-grow that is due now and then."""

from __future__ import annotations

from regrow.core.checks import require_dynamic
from regrow.methods.drop_grow import drop_grow
from regrow.parts import (
    Allocation,
    Anneal,
    Drop,
    Growth,
    Method,
    Regrow,
    Statistic,
    Timing,
    Units,
    by_gradient,
    cosine,
    erk,
    every,
    random_topology,
    smallest,
)


def dynamic_method(  # noqa: PLR0913 - every part of the update is an option
    name: str,
    density: float | None,
    *,
    until: int,
    begin: int | None = None,
    interval: int = 100,
    fraction: float = 0.3,
    anneal: Anneal = cosine,
    drop: Drop = smallest,
    grow: Growth = by_gradient,
    redistribute: Statistic | None = None,
    decay: float | None = None,
    allocate: Allocation = erk,
    regrow_dropped: Regrow = "keep",
    timing: Timing = "after",
    structure: Units | None = None,
) -> Method:
    """Begin at random, then drop and grow at steps begin, begin + interval, ... below until.

    The recipes `rigl`, `set_`, `snfs`, `dst`, `itop_set` and `itop_rigl` are this with other defaults.
    """
    require_dynamic(name, density, fraction, regrow_dropped, timing)
    moves = drop_grow(name, anneal(fraction, until, begin or 0), drop, grow, redistribute, decay, regrow_dropped)
    return Method(
        name,
        random_topology(density, allocate),
        every(interval, moves.update, begin=begin, until=until),
        observe=moves.observe,
        timing=timing,
        needs=moves.needs,
        units=structure,
    )
