"""How many entries each weight gets: exact integers that sum to the total.

An allocation is called with the weights, their scores (None where there are none) and a total of entries, and returns
one count per weight, at most what is active there now: all of it where the total is more. It counts units: entries,
unless the topologies say otherwise; then their entries are as near to the total as whole units come. `uniform`, `er`
and `erk` read shapes; `globally` and `layer_adaptive` read scores. `at_least`, `last_at_least`, `explicit` and
`by_flops` go around another allocation.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from typing import cast

import torch
from torch import Tensor

from regrow.core import selection
from regrow.core.method import Allocation
from regrow.core.names import matches
from regrow.core.topology import Topology
from regrow.core.weight import Shaped, Sized, SparseWeight, Weights


def apportion(shares: Sequence[float], total: int, capacity: Sequence[int]) -> list[int]:
    """Integers proportional to `shares`, none above its `capacity`, that sum to exactly `total`.

    What a full place cannot hold goes to the others in proportion to their shares, or to their capacity when all of
    these shares are zero. Fractions become integers by largest remainder (then larger share, larger capacity, earlier).

    Args:
        shares: (n,) numbers >= 0.
        total: what is given out, at most the sum of `capacity`.
        capacity: (n,) integers >= 0.

    Raises:
        ValueError: for a share that is negative or not finite (named by its place), or a total that does not fit.

    Examples:
        >>> apportion([1, 1, 2], 10, [2, 100, 100])
        [2, 3, 5]
    """
    for place, value in enumerate(shares):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"share number {place} of {len(shares)} is {value}: shares must be finite and at least 0")
    if not 0 <= total <= sum(capacity):
        raise ValueError(
            f"{len(capacity)} weights hold at most {sum(capacity):,} entries, so {total:,} cannot be placed"
        )
    largest = max(shares, default=0.0) or 1.0
    exact = _fill([s / largest for s in shares], total, capacity)
    counts = [min(c, math.floor(x + 1e-9)) for x, c in zip(exact, capacity, strict=True)]
    order = sorted(range(len(counts)), key=lambda i: (round(counts[i] - exact[i], 9), -shares[i], -capacity[i]))
    while short := total - sum(counts):
        for i in [i for i in order if counts[i] < capacity[i]][:short]:
            counts[i] += 1
    return counts


def _fill(shares: list[float], total: int, capacity: Sequence[int]) -> list[float]:
    """The real solution of sum(min(capacity, scale x shares)) = total; fsum keeps it free of order."""
    open_ = list(range(len(shares)))
    rest = total
    while True:
        weight = math.fsum(shares[i] for i in open_)
        if weight == 0:
            shares = [float(c) for c in capacity]
            weight = math.fsum(shares[i] for i in open_) or 1.0
        exact = {i: rest * (shares[i] / weight) for i in open_}
        full = {i for i in open_ if exact[i] >= capacity[i]}
        if not full:
            return [exact.get(i, float(c)) for i, c in enumerate(capacity)]
        open_ = [i for i in open_ if i not in full]
        rest -= sum(capacity[i] for i in full)


def whole_units(counts: Sequence[int], weights: Sequence[Sized]) -> list[int]:
    """How many units of each weight come nearest to these `counts` of entries: the largest remainders are rounded up.

    The entries of all together are as near to the sum as whole units allow; of two equally near numbers it is the
    smaller. A weight that gets entries gets one unit at least, beyond the sum if need be. Where a unit is an entry
    these are the counts.

    Args:
        counts: entries of each weight, at most what is active there.
        weights: whose topologies say what a unit is.

    Examples:
        >>> eights = [Shaped(n, (n, 10), Topology((n, 10), unit=(8, 1))) for n in (16, 8)]
        >>> whole_units([38, 10], eights)
        [5, 1]
    """
    sizes = [w.topology.unit_size for w in weights]
    exact = [n / size for n, size in zip(counts, sizes, strict=True)]
    chosen = [
        min(w.topology.active, max(math.floor(x + 1e-9), int(x > 0))) for x, w in zip(exact, weights, strict=True)
    ]
    missing = sum(counts) - sum(n * size for n, size in zip(chosen, sizes, strict=True))
    for i in sorted(range(len(chosen)), key=lambda i: round(chosen[i] - exact[i], 9)):
        if chosen[i] < weights[i].topology.active and 2 * missing > sizes[i]:
            chosen[i] += 1
            missing -= sizes[i]
    return chosen


def _entries(units: Iterable[int], weights: Iterable[Sized]) -> int:
    """How many entries so many units of each weight have."""
    return sum(n * w.topology.unit_size for n, w in zip(units, weights, strict=True))


def proportional(share: Callable[[Sized], float]) -> Allocation:
    """Counts proportional to `share(weight)`, capped at what each weight holds."""

    def allocate(weights: Sequence[Sized], scores: Sequence[Tensor] | None, total: int | None) -> list[int]:
        room = [w.topology.nnz for w in weights]
        return whole_units(apportion([share(w) for w in weights], _given(total, weights), room), weights)

    return allocate


uniform: Allocation = proportional(lambda w: math.prod(w.shape))
"""The same density everywhere. Source: Evci et al. 2020, Rigging the Lottery, section 3, (1)."""

er: Allocation = proportional(lambda w: _er_density(w) * math.prod(w.shape))
"""Erdos-Renyi: density proportional to (n_in + n_out) / (n_in n_out). Source: Mocanu et al. 2018, equation 1."""

erk: Allocation = proportional(lambda w: float(sum(w.shape)))
"""Erdos-Renyi-Kernel: density proportional to sum(shape) / prod(shape). Source: Evci et al. 2020, section 3, (1)."""


def erk_power(power: float) -> Allocation:
    """ERK with density proportional to (sum(shape) / prod(shape))^power: 1 is `erk`, 0 is `uniform`."""
    return proportional(lambda w: math.prod(w.shape) * (sum(w.shape) / math.prod(w.shape)) ** power)


def _er_density(weight: Sized) -> float:
    n_out, n_in = weight.shape[weight.out_axis], weight.shape[weight.in_axis]
    return (n_in + n_out) / (n_in * n_out)


def globally(weights: Sequence[Sized], scores: Sequence[Tensor] | None, total: int | None) -> list[int]:
    """Each weight's count among the `total` highest scores anywhere; equal scores go to the earlier weight.

    A score is that of a unit, and all its entries count. Their number is the nearest to the total that whole units
    allow, by the rule of `whole_units`.

    Raises:
        ValueError: without scores, as for a random start, or when one is NaN, naming the weight.
    """
    if scores is None:
        raise ValueError("globally ranks scores, and a random start has none: allocate by uniform, er or erk")
    for weight, score in zip(weights, scores, strict=True):
        if bool(score.isnan().any()):
            raise ValueError(
                f"{weight.name}: {int(score.isnan().sum()):,} of {score.numel():,} scores are NaN: training "
                "has diverged"
            )
    pooled = torch.cat([s.to(scores[0].device) for s in scores])
    sizes = torch.tensor([w.topology.unit_size for w in weights])
    lengths = torch.tensor([s.numel() for s in scores])
    chosen = _nearest_to(pooled, sizes.repeat_interleave(lengths), _given(total, weights))
    upto = torch.searchsorted(chosen, lengths.cumsum(0).to(chosen.device)).tolist()
    return [after - before for before, after in zip([0, *upto[:-1]], upto, strict=True)]


def _nearest_to(score: Tensor, sizes: Tensor, total: int) -> Tensor:
    """Positions, ascending, of the highest scores (n,) whose `sizes` (n,) add up to what is nearest to `total`."""
    if sizes.numel() == 0 or bool((sizes == sizes[0]).all()):
        size = int(sizes[0]) if sizes.numel() else 1
        return selection.highest(score, min(score.numel(), -((size - 2 * total) // (2 * size))))
    order = score.argsort(descending=True, stable=True)
    reached = torch.cat([sizes.new_zeros(1), sizes[order.to(sizes.device)].cumsum(0)])
    return order[: int((reached - total).abs().argmin())].sort().values


def layer_adaptive(weights: Sequence[Sized], scores: Sequence[Tensor] | None, total: int | None) -> list[int]:
    """LAMP: each weight's count among the `total` highest s^2 / (sum of t^2 over t that rank at or above s in it).

    A score is compared with those of its own weight that are not smaller, so that weights of different scale can be
    ranked together. In each weight the largest has 1, so none is emptied while the total allows it, and the order
    within a weight is that of the scores themselves. With magnitudes as scores this is the paper's rule.

    Raises:
        ValueError: without scores, as for a random start, or when one is NaN or negative, naming the weight.

    Source: Lee et al. 2021, Layer-adaptive Sparsity for the Magnitude-based Pruning, equation 4, written as an
    allocation. Equal scores rank by position. Counts are exact, where the code's threshold keeps ties.
    """
    if scores is None:
        raise ValueError("layer_adaptive ranks scores, and a random start has none: allocate by uniform, er or erk")
    for weight, score in zip(weights, scores, strict=True):
        if bool((score < 0).any()):
            raise ValueError(
                f"{weight.name}: {int((score < 0).sum()):,} of {score.numel():,} scores are negative, and "
                "layer_adaptive squares them: rank magnitudes"
            )
    return globally(weights, [_relative(s) for s in scores], total)


def _relative(score: Tensor) -> Tensor:
    """s^2 over the sum of squares of all that rank at or above it, (n,) float64; 0 where that sum is 0.

    On the CPU, since on a GPU the order of a sum, and with it a near tie, is not the same in every run.
    """
    squares = score.detach().cpu().double().square()
    ranked, order = squares.nan_to_num(nan=0.0, posinf=math.inf).sort(descending=True, stable=True)
    relative = torch.empty_like(ranked)
    relative[order] = (ranked / ranked.cumsum(0)).masked_fill(ranked == 0, 0.0)
    return relative.masked_fill(squares.isnan(), math.nan)


def by_flops(uses: Mapping[str, float], allocate: Allocation) -> Allocation:
    """`allocate` with a budget in multiplications: at density d the sparse weights cost a share d of the dense ones.

    The counts are those that `allocate` gives for the largest total whose multiplications, summed over weights as
    count x uses, are at most that share. So the entries are an outcome, and the density that a table shows is not d.
    `allocate` is asked about log2(entries) times.
    Where every weight has the same uses this is `allocate` itself; around `uniform` it changes no more than rounding.

    Args:
        uses: glob of a weight's or module's name -> how often one entry is multiplied for an example, at least 0: 1 for
            a linear layer, the output positions for a convolution. The first match counts, and globs that match
            nothing are ignored, so
            that {row.name: row.times[0] for row in regrow.metrics.flops(model, x).layers} will do.
        allocate: shares a total among the weights: `erk` for RigL's densities at a FLOP budget.

    Raises:
        ValueError: when a number of uses is negative or not finite; from the allocation, for a weight without uses, or
            when nothing is ever multiplied.

    Source: the rule is this library's; uses are counted as by Evci et al. 2020, Rigging the Lottery, appendix H. Their
    ERK network costs 0.42 of the FLOPs of a dense ResNet-50 at density 0.2, their uniform one 0.23.

    Examples:
        >>> shapes = {"conv": (10, 40), "fc": (10, 100)}
        >>> counts(by_flops({"conv": 25, "fc": 1}, erk), shapes, 0.1)
        {'conv': 40, 'fc': 89}
        >>> counts(erk, shapes, 0.1)
        {'conv': 44, 'fc': 96}
    """
    for pattern, use in uses.items():
        if not 0 <= use < math.inf:
            raise ValueError(f"by_flops: the uses of {pattern!r} must be finite and at least 0, got {use:g}")

    def budgeted(weights: Sequence[Sized], scores: Sequence[Tensor] | None, total: int | None) -> list[int]:
        unknown = [w.name for w in weights if _first_match(w.name, uses) is None]
        if unknown:
            raise ValueError(f"by_flops: no uses for {', '.join(unknown)}: add globs")
        if total is None:
            raise ValueError("by_flops: give a density, which is the share of the dense weights' multiplications")
        costs = [Fraction(_first_match(w.name, uses) or 0) for w in weights]
        sizes = [math.prod(w.shape) for w in weights]
        spans = [w.topology.unit_size for w in weights]
        dense = sum(c * n for c, n in zip(costs, sizes, strict=True))
        if dense == 0:
            raise ValueError(f"by_flops: no entry of {', '.join(w.name for w in weights)} is ever multiplied")
        # Fractions, so that a budget which the counts meet exactly is met.
        budget = Fraction(total, sum(sizes)) * dense

        def fits(entries: int) -> bool:
            found = allocate(weights, scores, entries)
            return sum(c * n * s for c, n, s in zip(costs, found, spans, strict=True)) <= budget

        held = sum(w.topology.nnz for w in weights)
        return allocate(weights, scores, bisect.bisect_left(range(1, held + 1), True, key=lambda n: not fits(n)))

    return budgeted


def at_least(minimum: int, allocate: Allocation) -> Allocation:
    """`allocate`, except that no weight gets less than `minimum` entries (or all it holds): no layer collapses."""

    def floors(weights: Sequence[Sized]) -> list[int]:
        return [-(-minimum // w.topology.unit_size) for w in weights]

    return _with_floors(f"at_least({minimum})", floors, allocate)


def last_at_least(density: float, layer: str | None, allocate: Allocation) -> Allocation:
    """`allocate`, except that one layer, commonly the last, never falls below `density` (or all it holds).

    Let that layer have n entries of N in all. With `uniform` and an overall density d below `density`, the others get
    the density (d N - density n) / (N - n).

    Args:
        density: the least density of that layer, in [0, 1].
        layer: a glob of its weight's or module's name; every weight that matches is a layer of its own. None is the
            last parameter.
        allocate: shares the total, and what remains of it among the others.

    Raises:
        ValueError: when `density` lies outside [0, 1]; from the allocation, for a glob that matches nothing, or a
            total that leaves nothing for the others.

    Source: Gale et al. 2019, The State of Sparsity in Deep Neural Networks, section 5.2, as the code of Liu et al.
    2021, Sparse Training via Boosting Pruning Plasticity with Neuroregeneration, has it for any density of the others.

    Examples:
        >>> shapes = {"conv": (10, 1000), "fc": (10, 100)}
        >>> counts(last_at_least(0.2, None, uniform), shapes, 0.1)
        {'conv': 900, 'fc': 200}
        >>> counts(last_at_least(0.2, None, uniform), shapes, 0.5)
        {'conv': 5000, 'fc': 500}
    """
    if not 0 <= density <= 1:
        raise ValueError(f"last_at_least: the density of the last layer must lie in [0, 1], got {density:g}")

    def guarded(weights: Sequence[Sized], scores: Sequence[Tensor] | None, total: int | None) -> list[int]:
        # Decided before any weight is held: among the remaining ones another would be the last.
        held = {weights[i].name for i in _layer(layer, weights)}
        require_last(density, layer, weights, _given(total, weights))

        def floors(those: Sequence[Sized]) -> list[int]:
            return [_count(w, density) if w.name in held else 0 for w in those]

        return _with_floors(f"last_at_least({density:g})", floors, allocate)(weights, scores, total)

    return guarded


def require_last(density: float, layer: str | None, weights: Sequence[Sized], total: int) -> None:
    """Raise ValueError when `last_at_least` can find no layer, or can leave no entry of `total` to the others."""
    held = _layer(layer, weights)
    floor = _entries([_count(weights[i], density) for i in held], [weights[i] for i in held])
    others = len(held) < len(weights)
    if floor > total or (others and floor == total):
        raise ValueError(
            f"last_at_least: density {density:g} of {', '.join(weights[i].name for i in held)} makes {floor:,} entries "
            f"of {total:,} in all{', which leaves none for the others' if others else ''}: lower it, or raise the "
            "overall density"
        )


def _layer(pattern: str | None, weights: Sequence[Sized]) -> list[int]:
    """The places of the weights that a glob matches, or of the last parameter's."""
    if not weights:
        return []
    if pattern is None:
        last = weights[-1].name.partition("[")[0]
        return [i for i, w in enumerate(weights) if w.name.partition("[")[0] == last]
    found = [i for i, w in enumerate(weights) if matches(pattern, w.name)]
    if not found:
        raise ValueError(f"last_at_least: {pattern!r} matches none of the weights {', '.join(w.name for w in weights)}")
    return found


def _with_floors(name: str, floors: Callable[[Sequence[Sized]], Sequence[int]], allocate: Allocation) -> Allocation:
    """`allocate`, except that no weight gets less than its floor (or all it holds)."""

    def guarded(weights: Sequence[Sized], scores: Sequence[Tensor] | None, total: int | None) -> list[int]:
        least = [min(n, w.topology.active) for n, w in zip(floors(weights), weights, strict=True)]
        held: dict[int, int] = {}
        given_total = _given(total, weights)
        while True:
            rest = [i for i in range(len(weights)) if i not in held]
            left = given_total - _entries(held.values(), [weights[i] for i in held])
            if left < 0:
                raise ValueError(f"{name}: {given_total:,} entries are too few for {len(weights)} weights")
            counts = allocate([weights[i] for i in rest], scores and [scores[i] for i in rest], left) if rest else []
            given = dict(zip(rest, counts, strict=True))
            short = {i: least[i] for i in rest if given[i] < least[i]}
            if not short:
                return [{**held, **given}[i] for i in range(len(weights))]
            held |= short

    return guarded


def explicit(densities: Mapping[str, float], rest: Allocation | None = None) -> Allocation:
    """Weights that match a glob get that density; `rest` shares what remains of the total among the others.

    Args:
        densities: glob -> density in [0, 1]; a glob is matched with the weight's name and with its module's. The
            first match counts.
        rest: the allocation of the weights that no glob matches; None makes such a weight an error.

    Raises:
        ValueError: from the allocation, for a glob that matches nothing, a weight without density, or a total that
            the given densities exceed (or, where they cover every weight, contradict).

    Examples:
        >>> shapes = {"fc1": (300, 784), "fc2": (100, 300), "fc3": (10, 100)}
        >>> counts(explicit({"fc1": 0.02, "fc3": 1.0}, rest=uniform), shapes, 0.05)
        {'fc1': 4704, 'fc2': 7606, 'fc3': 1000}
    """
    for pattern, density in densities.items():
        if not 0 <= density <= 1:
            raise ValueError(f"explicit: the density of {pattern!r} must lie in [0, 1], got {density:g}")

    def allocate(weights: Sequence[Sized], scores: Sequence[Tensor] | None, total: int | None) -> list[int]:
        given = {i: _count(w, d) for i, w in enumerate(weights) if (d := _first_match(w.name, densities)) is not None}
        _require_matches(densities, weights)
        others = [i for i in range(len(weights)) if i not in given]
        held = _entries(given.values(), [weights[i] for i in given])
        if others and rest is None:
            raise ValueError(
                f"explicit: no density for {', '.join(weights[i].name for i in others)}: add globs, or rest="
            )
        slack = sum(w.topology.unit_size for w in weights)
        excess = 0 if total is None else held - total if others else abs(held - total) - slack
        if excess > 0:
            raise ValueError(
                f"explicit: the given densities make {held:,} active entries, the density asks for {total:,}: "
                "change one, or leave the density out (None)"
            )
        if others and rest is not None:
            left = _given(total, weights) - held
            chosen = rest([weights[i] for i in others], scores and [scores[i] for i in others], left)
            given |= dict(zip(others, chosen, strict=True))
        return [given[i] for i in range(len(weights))]

    return allocate


def _first_match(name: str, numbers: Mapping[str, float]) -> float | None:
    return next((n for pattern, n in numbers.items() if matches(pattern, name)), None)


def _count(weight: Sized, density: float) -> int:
    """The units of a weight that come nearest to a density of its own; one at least, unless that is 0."""
    least = int(density > 0 and not weight.topology.is_unstructured)
    return min(weight.topology.active, max(least, math.floor(density * weight.topology.places + 0.5)))


def _require_matches(densities: Mapping[str, float], weights: Sequence[Sized]) -> None:
    for pattern in densities:
        if not any(matches(pattern, w.name) for w in weights):
            raise ValueError(f"explicit: {pattern!r} matches none of the weights {', '.join(w.name for w in weights)}")


def counts(allocate: Allocation, shapes: Mapping[str, tuple[int, ...]], density: float | None) -> dict[str, int]:
    """How many entries `allocate` gives to each of `shapes` at an overall `density`; no model needed.

    Shapes are read as (out, in, ...). Density None leaves it to an `explicit` allocation.

    Examples:
        >>> counts(erk, {"fc1": (300, 784), "fc2": (100, 300), "fc3": (10, 100)}, 0.02)
        {'fc1': 3621, 'fc2': 1336, 'fc3': 367}
    """
    weights = [Shaped(name, tuple(shape), Topology(tuple(shape))) for name, shape in shapes.items()]
    total = None if density is None else Weights(cast("tuple[SparseWeight, ...]", tuple(weights))).total(density)
    return dict(zip(shapes, allocate(weights, None, total), strict=True))


def _given(total: int | None, weights: Sequence[Sized]) -> int:
    """The total, or all that is active where that is less."""
    if total is None:
        raise ValueError("this allocation shares out a total: give a density, or an explicit density for every weight")
    return min(total, sum(w.topology.nnz for w in weights))
