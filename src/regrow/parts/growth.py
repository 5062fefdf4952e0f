"""Where new entries appear: growths, and the fields that they rank.

A method that takes a growth as an option learns from `needs_of` what it must be given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor

from regrow.core import selection
from regrow.core.method import Field, Growth, Need, Statistic
from regrow.core.topology import Topology
from regrow.core.units import by_index, by_unit, from_index
from regrow.core.weight import SparseWeight
from regrow.parts import drops
from regrow.parts.allocation import apportion
from regrow.parts.redistribution import mean_momentum
from regrow.parts.remembered import EXPLORED, MOMENTUM
from regrow.parts.structures import Diagonals, active_diagonals


def gradient(weight: SparseWeight) -> Iterator[tuple[int, Tensor]]:
    """The gradient of the loss at every position, inactive ones included; a `Field`.

    Source: Evci et al. 2020, Rigging the Lottery, section 3, (4) Grow criterion.
    """
    return weight.grad_blocks()


def momentum(weight: SparseWeight) -> Iterator[tuple[int, Tensor]]:
    """The running mean of gradients that `keep_momentum` keeps at every position; a `Field`.

    Source: Dettmers and Zettlemoyer 2019, Sparse Networks from Scratch, section 3.
    """
    yield 0, MOMENTUM.of(weight)


def at_random(weight: SparseWeight, taken: Topology, count: int) -> Tensor:
    """Positions drawn uniformly among those outside `taken`, in O(count + active); a `Growth`.

    Source: Mocanu et al. 2018, Algorithm 1.
    """
    ranks = torch.from_numpy(weight.generator.subset(taken.places - taken.active, count))
    return taken.inactive(ranks)


def at_random_where_lost(weight: SparseWeight, taken: Topology, count: int) -> Tensor:
    """Positions drawn uniformly, at each output as many as it lost, so that fan-ins stay; a `Growth`.

    With larger units an output is a row of units: a group of outputs that share their inputs.

    Raises:
        ValueError: from the growth, for a count that is not what the weight lost, as redistribution asks for, or where
            an output has no room for what it lost; naming the weight.

    It takes a byte for each unit of the weight, active or not.

    Source: the code of HASTE (Group-shared Fixed Fan-in, 2026), whose groups replace the inputs that they drop by
    random ones. There an input may be drawn twice.
    """
    active, kept = (_by_output(weight, t) for t in (weight.topology, taken))
    lost = active.sum(1) - kept.sum(1)
    if int(lost.sum()) != count or bool((lost < 0).any()) or bool((lost > (~kept).sum(1)).any()):
        raise ValueError(
            f"{weight.name}: at_random_where_lost gives every output back what it lost, {int(lost.sum()):,} in all, "
            f"and {count:,} are to grow where there is room: leave out redistribute and regrow_dropped='forbid'"
        )
    grown = torch.zeros_like(kept)
    for output in lost.nonzero().view(-1).tolist():
        free = (~kept[output]).nonzero().view(-1)
        grown[output, free[torch.from_numpy(weight.generator.subset(free.numel(), int(lost[output])))]] = True
    return from_index(taken.grid, weight.out_axis, grown).nonzero().view(-1)


def by_gradient_where_lost(m: int) -> Growth:
    """Grow where |gradient| is largest, in each `m` consecutive inputs as many as they lost, so that patterns n:m stay.

    The gradient is read in the groups that lost something, and nowhere else. Equal values go to the lower position.

    Args:
        m: inputs of a group, at each output and position of a kernel; the last group may have fewer.

    Raises:
        ValueError: for an `m` below 1; from the growth, for a count that is not what the weight lost, as redistribution
            asks for, or when a gradient is not finite; naming the weight.

    Source: the proposal of pytorch/ao issue 3222 (2025), where a 2:4 group that loses an entry gets back the position
    of largest dense gradient.
    """
    if m < 1:
        raise ValueError(f"by_gradient_where_lost: a group has at least 1 input, got m = {m}")

    def grow(weight: SparseWeight, taken: Topology, count: int) -> Tensor:
        lost = weight.topology.without(taken)
        if lost.numel() != count or not weight.topology.is_unstructured:
            raise ValueError(
                f"{weight.name}: by_gradient_where_lost gives every group of {m} inputs back what it lost, "
                f"{lost.numel():,} entries in all, and {count:,} are to grow: leave out redistribute, structure and "
                "regrow_dropped='forbid'"
            )
        stride, inputs = math.prod(weight.shape[weight.in_axis + 1 :]), weight.shape[weight.in_axis]
        first: Tensor
        quota: Tensor
        first, quota = torch.unique(lost - lost // stride % inputs % m * stride, return_counts=True)
        step = torch.arange(m, device=first.device)
        positions = first[:, None] + step * stride
        group = torch.arange(first.numel(), device=first.device)[:, None].expand_as(positions)
        inside = ((first // stride % inputs)[:, None] + step < inputs) & ~taken.contains(positions)
        candidates, order = positions[inside].sort()
        score = weight.grads_at(candidates).abs()
        require_finite(weight, score)
        best = _highest_of_each(group[inside][order].cpu(), score.cpu(), quota.cpu())
        return candidates[best.to(candidates.device)]

    return Reading(grow, Need.GRADIENT)


def unexplored_first(weight: SparseWeight, taken: Topology, count: int) -> Tensor:
    """Positions drawn uniformly among those never active, and only then among the others; a `Growth`.

    If fewer than `count` positions were never active, all of these grow, and the rest is drawn uniformly among the
    others outside `taken`. An entry that was just dropped was active, so it is one of the others.

    Raises:
        ValueError: when the method keeps no record of explored positions, naming the weight.

    Source: Liu et al. 2021, Do We Actually Need Dense Over-Parameterization?, its code's growth "random_unfired".
    There the rest is drawn entry by entry, so that the count is right on average only.
    """
    fresh = ~EXPLORED.of(weight)
    fresh[taken.indices.to(fresh.device)] = False
    positions = fresh.nonzero().view(-1)
    ranks = weight.generator.subset(positions.numel(), min(count, positions.numel()))
    chosen = positions[torch.from_numpy(ranks).to(positions.device)]
    if chosen.numel() == count:
        return chosen
    others = at_random(weight, taken.add(chosen), count - chosen.numel())
    return torch.cat([chosen, others.to(chosen.device)])


def diagonals_at_random(weight: SparseWeight, taken: Topology, count: int) -> Tensor:
    """Whole `diagonals` drawn uniformly among those outside `taken`; a `Growth`.

    Raises:
        ValueError: from the growth, for a count that is not one of whole diagonals, naming the weight.

    Source: as `at_random`, of diagonals.
    """
    free = _free_diagonals(weight, taken, count)
    ranks = weight.generator.subset(free.numel(), count // Diagonals.of(weight.shape).length)
    return _on_diagonals(weight, free[torch.from_numpy(ranks)])


READS: dict[Any, Need] = {
    gradient: Need.GRADIENT,
    momentum: Need.EVERY_GRADIENT,
    mean_momentum: Need.EVERY_GRADIENT,
    at_random: Need.NOTHING,
    at_random_where_lost: Need.NOTHING,
    diagonals_at_random: Need.NOTHING,
    unexplored_first: Need.EXPLORED,
}
"""What fields, growths and statistics that are plain functions read."""

_P = ParamSpec("_P")
_T = TypeVar("_T")


@dataclass(frozen=True)
class Reading(Generic[_P, _T]):
    """A growth or a statistic with what it `needs`: those made from others know it, and one of your own can say it."""

    part: Callable[_P, _T]
    needs: Need

    def __call__(self, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """What `part` answers."""
        return self.part(*args, **kwargs)


def needs_of(*parts: Growth | Statistic | None) -> Need:
    """What a method must be given that grows by these and redistributes by these; None reads nothing.

    `EVERY_GRADIENT` says that an observer must keep the running mean that is read. A function that is not in `READS`
    is taken to read nothing; wrap it in `Reading` to say otherwise.

    Examples:
        >>> needs_of(mixed(highest(gradient), unexplored_first, 0.5))
        <Need.GRADIENT|EXPLORED: 5>
        >>> needs_of(at_random, mean_momentum)
        <Need.EVERY_GRADIENT: 2>
    """
    found = Need.NOTHING
    for part in parts:
        found |= part.needs if isinstance(part, Reading) else READS.get(part, Need.NOTHING)
    return found


def highest(field: Field) -> Growth:
    """Grow where |field| is highest outside the taken topology; equal values go to the lower position.

    The field is consumed block by block with a running selection, so that no more than a block and the `count`
    best positions are ever held.

    Raises:
        ValueError: from the growth, when the field is not finite, naming the weight.

    Source: Evci et al. 2020, Rigging the Lottery, section 3, and its remark on an online top-k in appendix H.
    """

    def grow(weight: SparseWeight, taken: Topology, count: int) -> Tensor:
        _require_room(weight, taken, count)
        pool = _Pool(count)
        for first, score in _scores(weight, field):
            pool.offer(first, _outside(score, first, taken))
        return pool.best()

    return Reading(grow, _needs_of_field(field))


def highest_per_neuron(field: Field) -> Growth:
    """Share the new entries among the output neurons in proportion to their mean |field|; in each, grow the highest.

    The mean is over all entries of a neuron, active or not. A neuron gets no more than it has room for; the others
    share what it cannot hold. Equal values go to the lower position. The field is read twice, block by block.

    Raises:
        ValueError: from the growth, when the field is not finite, naming the weight.

    Source: Dettmers and Zettlemoyer 2019, Sparse Networks from Scratch, its code's growth "momentum_neuron". There
    quotas are rounded down, cut off at what is free and skipped below 10, so that entries are lost; here the total is
    exact.
    """

    def grow(weight: SparseWeight, taken: Topology, count: int) -> Tensor:
        _require_room(weight, taken, count)
        neuron, neurons = _neuron_of(weight), weight.topology.grid[weight.out_axis]
        # On the CPU and in order, so that every rank and run has the same sums.
        sums = torch.zeros(neurons, dtype=torch.float64)
        for first, score in _scores(weight, field):
            at = neuron(torch.arange(first, first + score.numel()))
            sums += torch.bincount(at, score.double().cpu(), minlength=neurons)
        size = weight.topology.places // neurons
        free = size - torch.bincount(neuron(taken.indices.cpu()), minlength=neurons)
        quota = torch.tensor(apportion((sums / size).tolist(), count, free.tolist()))
        best = torch.empty(0, dtype=torch.int64), torch.empty(0)
        for first, score in _scores(weight, field):
            outside = _outside(score, first, taken).cpu()
            at = (outside >= 0).nonzero().view(-1)
            positions = torch.cat([best[0], at + first])
            scores = torch.cat([best[1].to(outside.dtype), outside[at]])
            chosen = _highest_of_each(neuron(positions), scores, quota)
            best = positions[chosen], scores[chosen]
        return best[0]

    return Reading(grow, _needs_of_field(field))


def highest_diagonals(field: Field) -> Growth:
    """Grow whole `diagonals` of largest mean |field|; equal ones in ascending order.

    The field is consumed block by block; a number for each diagonal is held.

    Raises:
        ValueError: from the growth, for a count that is not one of whole diagonals, as redistribution may ask for, or
            when the field is not finite; naming the weight.

    Source: as `diagonals`; ranked as RigL ranks entries.
    """

    def grow(weight: SparseWeight, taken: Topology, count: int) -> Tensor:
        whole = Diagonals.of(weight.shape)
        sums = torch.zeros(whole.number, dtype=torch.float64)
        for first, score in _scores(weight, field):
            sums += whole.sums(first, score)
        free = _free_diagonals(weight, taken, count)
        return _on_diagonals(weight, free[selection.highest(sums[free], count // whole.length)])

    return Reading(grow, _needs_of_field(field))


def _free_diagonals(weight: SparseWeight, taken: Topology, count: int) -> Tensor:
    """The numbers of the diagonals outside `taken`, of which there must be enough for a `count` of entries."""
    whole = Diagonals.of(weight.shape)
    inactive = torch.ones(whole.number, dtype=torch.bool)
    inactive[active_diagonals(weight, taken)] = False
    free = inactive.nonzero().view(-1)
    if count % whole.length or count // whole.length > free.numel():
        raise ValueError(
            f"{weight.name}: {count:,} entries are to grow on diagonals of {whole.length:,}, of which {free.numel():,} "
            "are free: leave out redistribute, and drop lowest_diagonals"
        )
    return free


def _on_diagonals(weight: SparseWeight, chosen: Tensor) -> Tensor:
    return Diagonals.of(weight.shape).mask(chosen).nonzero().view(-1)


def sampled_gradient(gamma: float) -> Growth:
    """Grow where |gradient| is largest among floor(gamma active) candidates drawn uniformly outside the taken entries.

    There are at least as many candidates as entries to grow, and at most as many as there are free positions. The
    gradient is read at the candidates alone. Equal values go to the lower position.

    Args:
        gamma: candidates per active unit, finite and at least 0.

    Raises:
        ValueError: from the growth, when a gradient is not finite, naming the weight.

    Source: Heddes et al. 2024, section 3.
    """
    if not 0 <= gamma < math.inf:
        raise ValueError(f"sampled_gradient: gamma must be finite and at least 0, got {gamma:g}")

    def grow(weight: SparseWeight, taken: Topology, count: int) -> Tensor:
        wanted = max(count, math.floor(gamma * weight.topology.active))
        candidates = at_random(weight, taken, min(taken.places - taken.active, wanted))
        score = weight.grads_at(candidates).abs()
        require_finite(weight, score)
        score = taken.at(candidates).pooled(score, weight.pool)
        return candidates[selection.highest(score, count).to(candidates.device)]

    return Reading(grow, Need.GRADIENT)


def mixed(first: Growth, second: Growth, share: float) -> Growth:
    """Choose floor(share count) positions by `first`, and the rest by `second` among what is left.

    Args:
        first: places its part as if alone.
        second: places what is left.
        share: of the first, in [0, 1].

    Raises:
        ValueError: when `share` lies outside [0, 1].
    """
    if not 0 <= share <= 1:
        raise ValueError(f"mixed: the first growth's share must lie in [0, 1], got {share:g}")

    def grow(weight: SparseWeight, taken: Topology, count: int) -> Tensor:
        some = drops.share(share, count)
        if some == 0:
            return second(weight, taken, count)
        positions = first(weight, taken, some)
        if some == count:
            return positions
        others = second(weight, taken.add(positions), count - some)
        return torch.cat([positions, others.to(positions.device)])

    return Reading(grow, needs_of(first) | needs_of(second))


def _needs_of_field(field: Field) -> Need:
    """A field of someone's own is taken to read the gradient."""
    return READS.get(field, Need.GRADIENT)


def _require_room(weight: SparseWeight, taken: Topology, count: int) -> None:
    free = taken.places - taken.active
    if free < count:
        what = "entries" if taken.is_unstructured else "units"
        raise ValueError(f"{weight.name}: cannot grow {count:,} {what}, only {free:,} are free")


def _scores(weight: SparseWeight, field: Field) -> Iterator[tuple[int, Tensor]]:
    """|field| of each unit in float32 or wider, as (first position, block (n,)), ascending.

    Raises:
        ValueError: when it is not finite, naming the weight.
    """
    place = 0
    for _, values in field(weight):
        score = values.abs() if values.dtype == torch.float64 else values.abs().float()
        require_finite(weight, score)
        if not weight.topology.is_unstructured:
            score = weight.pool(by_unit(weight.shape, weight.topology.unit, _whole_rows(weight, score)))
        yield place, score
        place += score.numel()


def _whole_rows(weight: SparseWeight, block: Tensor) -> Tensor:
    """A block (n,) of a field, which must be made of whole rows of units (else ValueError)."""
    rows = weight.topology.unit[0] * math.prod(weight.shape[1:])
    if block.numel() % max(1, rows):
        raise ValueError(
            f"{weight.name}: a field came in a block of {block.numel():,} numbers, and a row of units has {rows:,}: "
            "yield whole rows of units"
        )
    return block


def require_finite(weight: SparseWeight, score: Tensor) -> None:
    """Raise ValueError when a growth `score` (n,) is not finite, naming the weight."""
    if not selection.is_finite(score):
        bad = int((~score.isfinite()).sum())
        raise ValueError(
            f"{weight.name}: {bad:,} of {score.numel():,} growth scores are not finite: lower the learning rate, "
            "or skip such steps with a gradient scaler"
        )


def _by_output(weight: SparseWeight, topology: Topology) -> Tensor:
    """Which units are active at each output, or at each row of units, bool (outputs, units of one) on the CPU."""
    mask = torch.zeros(topology.places, dtype=torch.bool)
    mask[topology.indices.cpu()] = True
    return by_index(topology.grid, weight.out_axis, mask)


def _neuron_of(weight: SparseWeight) -> Callable[[Tensor], Tensor]:
    """Flat positions (n,) -> the output neuron, or the row of units, of each (n,)."""
    grid = weight.topology.grid
    stride, neurons = math.prod(grid[weight.out_axis + 1 :]), grid[weight.out_axis]
    return lambda positions: positions // stride % neurons


def _highest_of_each(group: Tensor, score: Tensor, quota: Tensor) -> Tensor:
    """Ranks of the quota[g] highest scores in each group g, ascending; equal scores go to the lower rank.

    Args:
        group: (n,) int64 in [0, groups).
        score: (n,).
        quota: (groups,) int64.
    """
    order = score.argsort(descending=True, stable=True)
    order = order[group[order].argsort(stable=True)]
    ordered = group[order]
    place = torch.arange(ordered.numel()) - torch.searchsorted(ordered, ordered)
    return order[place < quota[ordered]].sort().values


class _Pool:
    """A running selection of the `count` highest scores; equal scores go to the lower position."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.floor = -1.0
        """What a score must exceed; all that were offered before and are no longer held are at most this."""
        self.positions: list[Tensor] = []
        self.scores: list[Tensor] = []

    def offer(self, first: int, score: Tensor) -> None:
        """Consider `score` (n,) of the positions from `first` on; blocks come in ascending order."""
        at = (score > self.floor).nonzero().view(-1)
        if at.numel() > self.count:
            at = at[selection.highest(score[at], self.count)]
        self.positions.append(at + first)
        self.scores.append(score[at])
        held = sum(s.numel() for s in self.scores)
        # Selecting anew at every block would cost more than the blocks where these are small.
        if held >= self.count * (1.5 if self.floor >= 0 else 1):
            self._select()

    def _select(self) -> None:
        positions, scores = torch.cat(self.positions), torch.cat(self.scores)
        if scores.numel() >= self.count:
            chosen = selection.highest(scores, self.count)
            positions, scores = positions[chosen], scores[chosen]
            self.floor = float(scores.min()) if self.count else math.inf
        self.positions, self.scores = [positions], [scores]

    def best(self) -> Tensor:
        """Positions of the highest scores, ascending, (count,) or fewer where fewer were offered."""
        if not self.positions:
            return torch.empty(0, dtype=torch.int64)
        self._select()
        return self.positions[0]


def _outside(score: Tensor, first: int, taken: Topology) -> Tensor:
    """`score` with -1 at taken positions: below any absolute value."""
    score[(taken.between(first, first + score.numel()) - first).to(score.device)] = -1.0
    return score


by_gradient: Growth = highest(gradient)
"""Grow where the gradient is largest."""

by_momentum: Growth = highest(momentum)
"""Grow where the running mean of gradients is largest."""

by_momentum_per_neuron: Growth = highest_per_neuron(momentum)
"""Grow in neurons with large running means of gradients, where these are largest."""

half_by_gradient: Growth = mixed(by_gradient, at_random, 0.5)
"""Grow half of the entries where the gradient is largest, the others at random."""
