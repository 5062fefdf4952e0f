"""The two acts that change topologies, and the gates around them."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from regrow.core.method import Allocation, Drop, Growth, Regrow, Rule, Score, Statistic, Structure, Update
from regrow.core.text import by, some
from regrow.core.topology import Topology
from regrow.core.weight import SparseWeight, Weights
from regrow.parts import allocation
from regrow.parts.drops import Careful, keep_highest, require_equal_units
from regrow.parts.schedules import Schedule
from regrow.parts.scores import unit_scores

_log = logging.getLogger("regrow")


def prune(density: Schedule, score: Score, allocate: Allocation, structure: Structure | None = None) -> Update:
    """Lower the density to `density(step)`, keeping the highest `score` within the counts of `allocate`.

    A `structure` says which patterns are allowed; without one every unit stands for itself. Gated by `every`, a ramp
    runs once more at its own end, so that its last density is reached exactly, or as nearly as whole units allow.

    Source: Zhu and Gupta 2017, To prune, or not to prune, section 3.
    """

    def apply(weights: Weights, step: int) -> None:
        prune_to(weights, weights.total(density(step)), score, allocate, structure)

    def require(weights: Weights) -> None:
        weights.require(density(density.until or 0))

    return (Rule(apply, last=density.until, require=require),)


def prune_to(
    weights: Weights, total: int | None, score: Score, allocate: Allocation, structure: Structure | None = None
) -> None:
    """Keep `total` entries of highest `score` within the counts of `allocate`; None leaves the total to it."""
    scores = [unit_scores(w, score) for w in weights]
    counts = allocate(weights, scores, total)
    if not any(counts) and any(not w.topology.is_unstructured for w in weights):
        raise ValueError(
            f"{total or 0:,} of {weights.numel:,} entries are fewer than half of the smallest unit, of "
            f"{min(w.topology.unit_size for w in weights):,}: raise the density, or give smaller units"
        )
    rewire(weights, [_kept(w, s, n, structure) for w, s, n in zip(weights, scores, counts, strict=True)])


def _kept(weight: SparseWeight, score: Tensor, count: int, structure: Structure | None) -> Topology:
    if structure is None:
        return keep_highest(weight, score, count)
    return structure(weight, everywhere(weight, score), count)


def everywhere(weight: SparseWeight, score: Tensor) -> Tensor:
    """The `score` (nnz,) of active entries as one of every position (numel,), -inf where nothing is active.

    Raises:
        ValueError: when entries are active in units, which a pattern of entries would tear apart, naming the weight.
    """
    if not weight.topology.is_unstructured:
        raise ValueError(
            f"{weight.name} is made of units of {by(weight.topology.unit)} entries, and what is asked for chooses "
            "single entries: leave out the method's structure=, or a start or pattern of single entries"
        )
    scores = torch.full((weight.topology.numel,), -math.inf, dtype=score.dtype, device=score.device)
    scores[weight.topology.indices.to(score.device)] = score
    return scores


def drop_and_grow(
    fraction: Schedule,
    drop: Drop,
    grow: Growth,
    redistribute: Statistic | None = None,
    regrow_dropped: Regrow = "keep",
) -> Update:
    """Drop a fraction of every weight's active units and grow as many: the total never changes.

    A unit is an entry unless the method says otherwise.

    Args:
        fraction: the share of active units that is dropped at a step; floor(fraction active) in each weight.
        drop: what stays.
        grow: where new entries appear.
        redistribute: each weight's share of all that was dropped, limited by the room it has; None gives every
            weight back what it lost.
        regrow_dropped: what happens to an entry that is dropped and would grow again at once. "keep" leaves its value
            and optimizer state as they are (as in the code of RigL), "reset" sets them to zero, and "forbid" grows
            others in its place; then no more is dropped than can be grown.

    A weight that the last backward did not reach is left as it is, with a line in the log `regrow`.

    Source: Evci et al. 2020, Rigging the Lottery, Algorithm 1; redistribution after Dettmers and Zettlemoyer
    2019, Sparse Networks from Scratch, section 3.
    """

    def apply(weights: Weights, step: int) -> None:
        live = reached(weights, step)
        free = [_room(w.topology) for w in live]
        share = fraction(step)
        shares = [
            min(share, n / w.topology.active) if regrow_dropped == "forbid" and w.topology.active else share
            for w, n in zip(live, free, strict=True)
        ]
        kept = drop(live, shares)
        if regrow_dropped == "forbid":
            kept = [_within(w, k, n) for w, k, n in zip(live, kept, free, strict=True)]
        taken = [w.topology if regrow_dropped == "forbid" else k for w, k in zip(live, kept, strict=True)]
        counts = grown_counts(live, kept, taken, redistribute)
        grown = [k.add(grow(w, t, n)) if n else k for w, k, t, n in zip(live, kept, taken, counts, strict=True)]
        if regrow_dropped == "reset":
            rewire(live, kept)
        rewire(live, grown)

    def require(weights: Weights) -> None:
        if isinstance(drop, Careful):
            drop.require(weights)
        if redistribute is not None:
            require_equal_units("redistribute", weights)

    return (Rule(apply, require=require),)


def reached(weights: Weights, step: int) -> list[SparseWeight]:
    """The weights that the last backward reached; the others are named in the log `regrow`."""
    live = [w for w in weights if w.has_grad]
    if len(live) < len(weights):
        idle = [w.name for w in weights if not w.has_grad]
        _log.warning("step %d: no gradient reached %s: left as they are by the update", step, some(idle))
    return live


def grown_counts(
    live: Sequence[SparseWeight], kept: Sequence[Topology], taken: Sequence[Topology], redistribute: Statistic | None
) -> list[int]:
    """How many units each weight grows: in all as many as were dropped, shared out by a statistic or as they were.

    Args:
        live: the weights as they are before the update.
        kept: what each keeps.
        taken: where each cannot grow.
        redistribute: each weight's share; None gives every weight back what it lost.

    Raises:
        ValueError: when a share is negative or not finite, naming the weight, or when units differ in size.
    """
    dropped = [w.topology.active - k.active for w, k in zip(live, kept, strict=True)]
    if redistribute is None:
        return dropped
    require_equal_units("redistribute", live)
    shares = [redistribute(w, k) for w, k in zip(live, kept, strict=True)]
    for weight, value in zip(live, shares, strict=True):
        if not 0 <= value < math.inf:
            raise ValueError(f"{weight.name}: its share of the redistribution is {value}: training has diverged")
    return allocation.apportion(shares, sum(dropped), [_room(t) for t in taken])


def _room(taken: Topology) -> int:
    return taken.places - taken.active


def _within(weight: SparseWeight, kept: Topology, room: int) -> Topology:
    """`kept`, and the dropped units that no free position can replace: the ones at the lowest positions come back."""
    dropped = weight.topology.without(kept)
    return kept.add(dropped[: max(0, dropped.numel() - room)])


def rewire(weights: Sequence[SparseWeight], topologies: Sequence[Topology]) -> None:
    """Give each weight its new topology; all are known before the first changes, so errors leave all as they were.

    Raises:
        ValueError: when a topology is made of other units than the weight, naming it.
    """
    for weight, topology in zip(weights, topologies, strict=True):
        if topology.unit != weight.topology.unit:
            raise ValueError(
                f"{weight.name} is made of units of {by(weight.topology.unit)} entries, and its new topology of "
                f"{by(topology.unit)}: make it by weight.topology.at(positions)"
            )
    for weight, topology in zip(weights, topologies, strict=True):
        weight.rewire(topology)


def chain(*updates: Update) -> Update:
    """All of `updates`, applied in this order at the steps where each is due."""
    return tuple(rule for update in updates for rule in update)


def checked(update: Update, require: Callable[[Weights], object]) -> Update:
    """`update`, refused at once where `require` raises: when these weights can never satisfy it.

    What the update requires by itself is checked first.
    """
    first, *others = update

    def both(weights: Weights) -> None:
        first.require(weights)
        require(weights)

    return (first._replace(require=both), *others)


def every(interval: int, update: Update, *, until: int, begin: int | None = None) -> Update:
    """`update` at steps begin, begin + interval, ... strictly below `until`; never at step 0.

    Args:
        interval: optimizer steps between two updates.
        update: what is gated. A rule that names a `last` step runs there too.
        until: no update at this step or later.
        begin: the first update; None or 0 means `interval`.

    Raises:
        ValueError: when no step satisfies this.

    Source: Evci et al. 2020, Rigging the Lottery, Algorithm 1 ("t mod Delta T = 0 and t < T_end").

    Examples:
        >>> rule, = every(100, (Rule(lambda weights, step: None),), until=300)
        >>> [step for step in range(400) if rule.due(step)]
        [100, 200]
    """
    first = begin or interval
    if interval < 1 or first < 1:
        raise ValueError(
            f"updates must be at least 1 step apart and begin at step 1 or later, got interval {interval}, "
            f"begin {begin}"
        )
    if until <= first:
        raise ValueError(
            f"no update would ever happen: the first is due at step {first}, and until is {until}: raise "
            "until or lower the interval"
        )
    return tuple(_gated(rule, interval, first, until) for rule in update)


def _gated(rule: Rule, interval: int, first: int, until: int) -> Rule:
    def due(step: int) -> bool:
        regular = first <= step < until and (step - first) % interval == 0
        return (regular and rule.due(step)) or step == rule.last

    return rule._replace(due=due)
