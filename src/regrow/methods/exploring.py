"""In-time over-parameterization: dynamic sparse training that is meant to visit many positions, and counts them."""

from __future__ import annotations

from regrow.core.checks import require_dynamic
from regrow.core.method import Allocation, Growth, Method, Need, Regrow, Timing
from regrow.methods.dynamic import Anneal
from regrow.parts import growth, starts
from regrow.parts.allocation import erk
from regrow.parts.drops import lowest
from regrow.parts.schedules import cosine
from regrow.parts.scores import magnitude
from regrow.parts.updates import drop_and_grow, every


def itop_set(
    density: float | None,
    *,
    until: int,
    begin: int | None = None,
    interval: int = 1500,
    fraction: float = 0.5,
    anneal: Anneal = cosine,
    grow: Growth = growth.at_random,
    allocate: Allocation = erk,
    regrow_dropped: Regrow = "keep",
    timing: Timing = "after",
) -> Method:
    """SET-ITOP: SET with long intervals and no early end, and a record of every position that was ever active.

    Args:
        density: active share of the sparsified entries, in (0, 1]; None leaves it to an explicit allocation.
        until: optimizer step from which the topology is fixed; the paper updates to the end of the run.
        begin: optimizer step of the first update; None means `interval`.
        interval: optimizer steps between two updates: long enough that new entries can show what they are worth.
        fraction: share of active entries dropped at first, in [0, 1].
        anneal: how that share moves: `cosine`, `constant`, `linear`, `inverse_power`, `cosine_to(0.005)`.
        grow: `growth.at_random`, `growth.unexplored_first`, or any growth that reads no running mean.
        allocate: how the active entries are shared among the weights at the start.
        regrow_dropped: "keep", "reset" or "forbid" entries that are dropped and would grow again at once.
        timing: the update comes "after" an optimizer step, as in the paper's code, or "instead" of one.

    Source: Liu et al. 2021, Do We Actually Need Dense Over-Parameterization? In-Time Over-Parameterization in Sparse
    Training, sections 3.2 and 4. No update at the last step, which would leave untrained entries behind; the drop
    fraction ends at 0, in the code at 0.005; counts are exact where the code draws every entry by itself.

    Examples:
        >>> itop_set(0.1, until=5000, grow=growth.unexplored_first).needs
        <Need.EXPLORED: 4>
    """
    return _itop("itop_set", density, until, begin, interval, fraction, anneal, grow, allocate, regrow_dropped, timing)


def itop_rigl(
    density: float | None,
    *,
    until: int,
    begin: int | None = None,
    interval: int = 4000,
    fraction: float = 0.5,
    anneal: Anneal = cosine,
    grow: Growth = growth.by_gradient,
    allocate: Allocation = erk,
    regrow_dropped: Regrow = "keep",
    timing: Timing = "after",
) -> Method:
    """RigL-ITOP: RigL with long intervals and no early end, and a record of every position that was ever active.

    Args:
        density: active share of the sparsified entries, in (0, 1]; None leaves it to an explicit allocation.
        until: optimizer step from which the topology is fixed; the paper updates to the end of the run.
        begin: optimizer step of the first update; None means `interval`.
        interval: optimizer steps between two updates: long enough that new entries can show what they are worth.
        fraction: share of active entries dropped at first, in [0, 1].
        anneal: how that share moves: `cosine`, `constant`, `linear`, `inverse_power`, `cosine_to(0.005)`.
        grow: `growth.by_gradient`, `growth.unexplored_first`, or any growth that reads no running mean.
        allocate: how the active entries are shared among the weights at the start.
        regrow_dropped: "keep", "reset" or "forbid" entries that are dropped and would grow again at once.
        timing: the update comes "after" an optimizer step, as in the paper's code, or "instead" of one.

    Source: Liu et al. 2021, Do We Actually Need Dense Over-Parameterization? In-Time Over-Parameterization in Sparse
    Training, sections 3.2 and 4. No update at the last step, which would leave untrained entries behind; the drop
    fraction ends at 0, in the code at 0.005.

    Examples:
        >>> itop_rigl(0.1, until=5000).needs
        <Need.GRADIENT|EXPLORED: 5>
    """
    return _itop("itop_rigl", density, until, begin, interval, fraction, anneal, grow, allocate, regrow_dropped, timing)


def _itop(
    name: str,
    density: float | None,
    until: int,
    begin: int | None,
    interval: int,
    fraction: float,
    anneal: Anneal,
    grow: Growth,
    allocate: Allocation,
    regrow_dropped: Regrow,
    timing: Timing,
) -> Method:
    require_dynamic(name, density, fraction, regrow_dropped, timing)
    needs = Need.EXPLORED | growth.needs_unobserved(name, grow)
    schedule = anneal(fraction, until, begin or 0)
    update = drop_and_grow(schedule, lowest(magnitude), grow, regrow_dropped=regrow_dropped)
    return Method(
        name,
        starts.random_topology(density, allocate),
        every(interval, update, begin=begin, until=until),
        timing=timing,
        needs=needs,
    )
