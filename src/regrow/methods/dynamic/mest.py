"""MEST, with its soft memory bound."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import torch

from regrow.core.checks import require_dynamic
from regrow.methods.drop_grow import reads
from regrow.methods.dynamic.composition import dynamic_method
from regrow.methods.recipe import recipe
from regrow.parts import (
    TARGET,
    Allocation,
    Anneal,
    Growth,
    Method,
    Need,
    Regrow,
    Rule,
    Schedule,
    Score,
    SparseWeight,
    Statistic,
    Timing,
    Topology,
    Units,
    Update,
    Weights,
    apportion,
    at_random,
    every,
    keep_highest,
    linear,
    lowest,
    magnitude_and_gradient,
    random_topology,
    reached,
    rewire,
    share,
    uniform,
    unit_scores,
)

_log = logging.getLogger("regrow")


@recipe
def mest(  # noqa: PLR0913 - every part of the update but the drop is an option
    density: float | None,
    *,
    until: int,
    begin: int | None = None,
    interval: int = 1000,
    fraction: float = 0.2,
    anneal: Anneal = linear,
    gradient_weight: float = 1.0,
    soft: bool = False,
    grow: Growth = at_random,
    redistribute: Statistic | None = None,
    decay: float | None = None,
    allocate: Allocation = uniform,
    regrow_dropped: Regrow = "reset",
    timing: Timing = "after",
    structure: Units | None = None,
) -> Method:
    """MEST: drop where |w| + gradient_weight |g| is smallest, grow at random, less and less (elastic mutation).

    Args:
        fraction: share of active entries dropped at first, in [0, 1]; soft, the share grown beyond the density.
        gradient_weight: the paper's lambda, at least 0; 0 ranks magnitudes alone, as the published scripts do.
        soft: a soft memory bound (EM&S): entries are grown beyond the density, trained to the next update, and only
            then the lowest of all are dropped. At `until` the last of these goes. It cannot redistribute.

    Source: Yuan et al. 2021, MEST: Accurate and Fast Memory-Economic Sparse Training Framework on the Edge, sections
    3.2 and 3.3, which updates every 5 epochs for three quarters of the run. The published scripts lower the share in
    three stages (20 %, 10 %, none of the active entries at density 0.1), here it falls smoothly. Counts are exact where
    the code compares with a percentile. Soft, a weight holds at most twice what it started with; what it has no room
    for is grown in the others and told in the log.

    Examples:
        >>> method = mest(0.1, until=3500, soft=True)
        >>> [step for step in range(5000) if method.due(step)]
        [1000, 2000, 3000, 3500]
    """
    require_dynamic("mest", density, fraction, regrow_dropped, timing)
    if not 0 <= gradient_weight < math.inf:
        raise ValueError(f"mest: gradient_weight must be finite and at least 0, got {gradient_weight:g}")
    score = magnitude_and_gradient(gradient_weight)
    if not soft:
        return dynamic_method(
            "mest",
            density,
            until=until,
            begin=begin,
            interval=interval,
            fraction=fraction,
            anneal=anneal,
            drop=lowest(score),
            grow=grow,
            redistribute=redistribute,
            decay=decay,
            allocate=allocate,
            regrow_dropped=regrow_dropped,
            timing=timing,
            structure=structure,
        )
    if redistribute is not None:
        raise ValueError(
            "mest: a soft memory bound brings every weight back to its own number of entries, and redistribute would "
            "move them between weights: give one of them"
        )
    needs, observe = reads("mest", grow, None, decay)
    update = _overshoot(anneal(fraction, until, begin or 0), score, grow, until, regrow_dropped)
    return Method(
        "mest",
        random_topology(density, allocate),
        every(interval, update, begin=begin, until=until),
        observe=observe,
        timing=timing,
        needs=needs | Need.OVERSHOOT,
        units=structure,
    )


def _overshoot(fraction: Schedule, score: Score, grow: Growth, until: int, regrow_dropped: Regrow) -> Update:
    """Drop back to the number of units at the start, then grow a fraction of it beyond; at `until` only drop.

    That number is remembered as `TARGET` of each weight.
    """

    def apply(weights: Weights, step: int) -> None:
        live = reached(weights, step) if step < until else list(weights)
        targets = [_target(w) for w in live]
        kept = [
            keep_highest(w, unit_scores(w, score), n) if n < w.topology.active else w.topology
            for w, n in zip(live, targets, strict=True)
        ]
        taken = [w.topology if regrow_dropped == "forbid" else k for w, k in zip(live, kept, strict=True)]
        counts = _beyond(live, taken, targets, fraction(step) if step < until else 0.0, step)
        grown = [k.add(grow(w, t, n)) if n else k for w, k, t, n in zip(live, kept, taken, counts, strict=True)]
        if regrow_dropped == "reset":
            rewire(live, kept)
        rewire(live, grown)

    return (Rule(apply, last=until),)


def _target(weight: SparseWeight) -> int:
    return int(TARGET.begin(weight, lambda: torch.tensor(weight.topology.active)))


def _beyond(
    live: Sequence[SparseWeight], taken: Sequence[Topology], targets: Sequence[int], fraction: float, step: int
) -> list[int]:
    """How many units each weight grows beyond its target: floor(fraction target) where there is room for them."""
    wanted = [share(fraction, n) for n in targets]
    room = [min(n, t.places - t.active) for n, t in zip(targets, taken, strict=True)]
    counts = apportion(wanted, min(sum(wanted), sum(room)), room)
    for w, asked, given in zip(live, wanted, counts, strict=True):
        if given < asked:
            _log.warning(
                "step %d: %s has room for %d of %d entries beyond its density: %d grow in all, of %d",
                *(step, w.name, given, asked, sum(counts), sum(wanted)),
            )
    return counts
