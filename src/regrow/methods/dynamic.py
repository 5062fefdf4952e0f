"""Dynamic sparse training: the number of connections stays, their places move."""

from __future__ import annotations

from collections.abc import Callable

from regrow.core.checks import require_dynamic
from regrow.core.method import Allocation, Drop, Growth, Method, Need, Regrow, Statistic, Timing
from regrow.parts import growth, observers, starts
from regrow.parts.allocation import er, erk, uniform
from regrow.parts.drops import lowest
from regrow.parts.growth import by_gradient
from regrow.parts.redistribution import mean_momentum
from regrow.parts.schedules import Schedule, constant, cosine
from regrow.parts.scores import magnitude
from regrow.parts.updates import drop_and_grow, every

Anneal = Callable[[float, int, int], Schedule]
"""How the drop fraction moves: (first value, until, begin) -> schedule."""

smallest: Drop = lowest(magnitude)
"""Drop the smallest magnitudes."""


def rigl(
    density: float | None,
    *,
    until: int,
    begin: int | None = None,
    interval: int = 100,
    fraction: float = 0.3,
    anneal: Anneal = cosine,
    allocate: Allocation = erk,
    regrow_dropped: Regrow = "keep",
    timing: Timing = "instead",
) -> Method:
    """RigL: drop the smallest magnitudes, grow where the gradient is largest.

    Args:
        density: active share of the sparsified entries, in (0, 1]; None leaves it to an explicit allocation.
        until: optimizer step from which the topology is fixed; the paper takes three quarters of the run.
        begin: optimizer step of the first update; None means `interval`.
        interval: optimizer steps between two updates.
        fraction: share of active entries dropped at first, in [0, 1].
        anneal: how that share moves: `cosine`, `constant`, `linear`, `inverse_power`.
        allocate: how the active entries are shared among the weights at the start.
        regrow_dropped: "keep", "reset" or "forbid" entries that are dropped and would grow again at once.
        timing: the update comes "instead" of an optimizer step, as in Algorithm 1, or "after" one.

    Source: Evci et al. 2020, Rigging the Lottery: Making All Tickets Winners, Algorithm 1. No noise is added to the
    scores, inactive entries cannot survive the drop, and the first update is at `interval`, not at step 0.

    Examples:
        >>> method = rigl(0.1, until=350)
        >>> [step for step in range(500) if method.due(step)]
        [100, 200, 300]
    """
    require_dynamic("rigl", density, fraction, regrow_dropped, timing)
    grow = growth.highest(growth.gradient)
    update = drop_and_grow(anneal(fraction, until, begin or 0), smallest, grow, regrow_dropped=regrow_dropped)
    return Method(
        "rigl",
        starts.random_topology(density, allocate),
        every(interval, update, begin=begin, until=until),
        timing=timing,
        needs=Need.GRADIENT,
    )


def set_(
    density: float | None,
    *,
    until: int,
    begin: int | None = None,
    interval: int = 100,
    fraction: float = 0.3,
    anneal: Anneal = constant,
    drop: Drop = smallest,
    allocate: Allocation = er,
    regrow_dropped: Regrow = "keep",
    timing: Timing = "after",
) -> Method:
    """SET: drop the smallest magnitudes, grow at random.

    Args:
        density: active share of the sparsified entries, in (0, 1]; None leaves it to an explicit allocation.
        until: optimizer step from which the topology is fixed.
        begin: optimizer step of the first update; None means `interval`.
        interval: optimizer steps between two updates; the paper rewires once an epoch.
        fraction: share of active entries dropped, in [0, 1] (the paper's zeta).
        anneal: how that share moves: `constant` as in the paper, `cosine`, `linear`, `inverse_power`.
        drop: `smallest` magnitudes, or `lowest_per_sign` as in the original code.
        allocate: how the active entries are shared among the weights at the start.
        regrow_dropped: "keep", "reset" or "forbid" entries that are dropped and would grow again at once.
        timing: the update comes "after" an optimizer step, as in the paper, or "instead" of one.

    Source: Mocanu et al. 2018, Scalable training of artificial neural networks with adaptive sparse connectivity
    inspired by network science, Algorithm 1. Plain magnitude is the default: SET's and SNFS's authors found it
    the better drop. Counts are exact where the code of SET's successors draws every entry by itself.

    Examples:
        >>> set_(0.1, until=350).timing
        'after'
    """
    require_dynamic("set", density, fraction, regrow_dropped, timing)
    update = drop_and_grow(anneal(fraction, until, begin or 0), drop, growth.at_random, regrow_dropped=regrow_dropped)
    return Method(
        "set",
        starts.random_topology(density, allocate),
        every(interval, update, begin=begin, until=until),
        timing=timing,
    )


def snfs(
    density: float | None,
    *,
    until: int,
    begin: int | None = None,
    interval: int = 100,
    fraction: float = 0.5,
    anneal: Anneal = cosine,
    decay: float = 0.9,
    redistribute: Statistic | None = mean_momentum,
    allocate: Allocation = uniform,
    regrow_dropped: Regrow = "keep",
    timing: Timing = "after",
) -> Method:
    """SNFS (sparse momentum): grow where a running mean of gradients is largest, and move entries between weights.

    Args:
        density: active share of the sparsified entries, in (0, 1]; None leaves it to an explicit allocation.
        until: optimizer step from which the topology is fixed.
        begin: optimizer step of the first update; None means `interval`.
        interval: optimizer steps between two updates; the paper updates once an epoch.
        fraction: share of active entries dropped at first, in [0, 1].
        anneal: how that share moves: `cosine`, `constant`, `linear`, `inverse_power`.
        decay: of the running mean of gradients, in [0, 1); 0 ranks the gradient of one batch.
        redistribute: each weight's share of all that was dropped: `mean_momentum`, `mean_magnitude`, `nonzeros`, or
            None to give every weight back what it lost. Overflow goes only to weights with room.
        allocate: how the active entries are shared among the weights at the start.
        regrow_dropped: "keep", "reset" or "forbid" entries that are dropped and would grow again at once.
        timing: the update comes "after" an optimizer step, as in the paper's code, or "instead" of one.

    Source: Dettmers and Zettlemoyer 2019, Sparse Networks from Scratch, section 3. New entries start with zero
    optimizer state, where the code lets them inherit the dense momentum; the code's brake on nearly dense layers
    and its correction of inexact counts are not needed.

    Examples:
        >>> snfs(0.1, until=350).needs
        <Need.EVERY_GRADIENT|ROOM: 18>
    """
    require_dynamic("snfs", density, fraction, regrow_dropped, timing)
    if not 0 <= decay < 1:
        raise ValueError(f"snfs: decay must lie in [0, 1), got {decay:g}")
    grow = growth.highest(growth.momentum)
    update = drop_and_grow(anneal(fraction, until, begin or 0), smallest, grow, redistribute, regrow_dropped)
    return Method(
        "snfs",
        starts.random_topology(density, allocate),
        every(interval, update, begin=begin, until=until),
        observe=observers.momentum(decay),
        timing=timing,
        needs=Need.EVERY_GRADIENT | (Need.NOTHING if redistribute is None else Need.ROOM),
    )


def dst(  # noqa: PLR0913 - every part of the update is an option
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
) -> Method:
    """Dynamic sparse training with any drop, any growth and any redistribution.

    Args:
        density: active share of the sparsified entries, in (0, 1]; None leaves it to an explicit allocation.
        until: optimizer step from which the topology is fixed.
        begin: optimizer step of the first update; None means `interval`.
        interval: optimizer steps between two updates.
        fraction: share of active entries dropped at first, in [0, 1].
        anneal: how that share moves: `cosine`, `constant`, `linear`, `inverse_power`.
        drop: what goes: `smallest` magnitudes, `lowest_per_sign`, or any other drop.
        grow: where entries appear: by gradient, at random, by momentum, unexplored first, or any other growth.
        redistribute: each weight's share of all that was dropped, or None to give every weight back what it lost.
        decay: of the running mean of gradients, in [0, 1), where `grow` or `redistribute` reads it; None means 0.9.
        allocate: how the active entries are shared among the weights at the start.
        regrow_dropped: "keep", "reset" or "forbid" entries that are dropped and would grow again at once.
        timing: the update comes "after" an optimizer step or "instead" of one.

    Source: Liu et al. 2021, Sparse Training via Boosting Pruning Plasticity with Neuroregeneration, the code's method
    "DST", whose options are ignored there on small data sets; the parts have sources of their own.

    Examples:
        >>> from regrow.parts import growth
        >>> dst(0.1, until=350, grow=growth.at_random, redistribute=mean_momentum).needs
        <Need.EVERY_GRADIENT|ROOM: 18>
    """
    require_dynamic("dst", density, fraction, regrow_dropped, timing)
    needs = growth.needs_of(grow) | (Need.NOTHING if redistribute is None else Need.ROOM)
    if redistribute is mean_momentum:
        needs |= Need.EVERY_GRADIENT
    observes = Need.EVERY_GRADIENT in needs
    if decay is not None and not observes:
        raise ValueError(
            f"dst: decay is of a running mean of gradients, which neither growth nor redistribution reads: leave out "
            f"{decay:g}"
        )
    if decay is not None and not 0 <= decay < 1:
        raise ValueError(f"dst: decay must lie in [0, 1), got {decay:g}")
    update = drop_and_grow(anneal(fraction, until, begin or 0), drop, grow, redistribute, regrow_dropped)
    return Method(
        "dst",
        starts.random_topology(density, allocate),
        every(interval, update, begin=begin, until=until),
        observe=observers.momentum(0.9 if decay is None else decay) if observes else None,
        timing=timing,
        needs=needs,
    )
