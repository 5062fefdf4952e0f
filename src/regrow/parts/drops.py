"""What stays when every weight loses a fraction of its active entries."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from regrow.core import selection
from regrow.core.method import Drop, Score
from regrow.core.text import by
from regrow.core.topology import Topology
from regrow.core.weight import Shaped, SparseWeight
from regrow.parts.allocation import at_least, globally
from regrow.parts.remembered import DROP_THRESHOLD
from regrow.parts.scores import magnitude, unit_scores
from regrow.parts.structures import Diagonals, active_diagonals


@dataclass(frozen=True)
class Careful:
    """A drop with what it `require`s of weights: that raises where it can never work, before training begins."""

    part: Drop
    require: Callable[[Sequence[SparseWeight]], object]

    def __call__(self, weights: Sequence[SparseWeight], fractions: Sequence[float]) -> list[Topology]:
        """What `part` keeps."""
        return self.part(weights, fractions)


def keep_highest(weight: SparseWeight, score: Tensor, count: int) -> Topology:
    """The `count` active units of highest `score` (active,).

    Raises:
        ValueError: when a score is NaN, naming the weight.
    """
    try:
        return weight.topology.keep(score, count)
    except ValueError as error:
        raise ValueError(f"{weight.name}: {error}") from None


def lowest(score: Score) -> Drop:
    """Drop the floor(fraction active) units of lowest `score` from every weight; ties drop the higher position.

    Where a unit is an entry, these are entries; otherwise the scores of a unit's entries are pooled.

    Source: Evci et al. 2020, Rigging the Lottery, Algorithm 1, line "TopK(|theta|, ...)".
    """

    def drop(weights: Sequence[SparseWeight], fractions: Sequence[float]) -> list[Topology]:
        kept = [w.topology.active - share(f, w.topology.active) for w, f in zip(weights, fractions, strict=True)]
        return [
            keep_highest(w, unit_scores(w, score), n) if n < w.topology.active else w.topology
            for w, n in zip(weights, kept, strict=True)
        ]

    return drop


smallest: Drop = lowest(magnitude)
"""Drop the smallest magnitudes of every weight."""


def lowest_globally(score: Score) -> Drop:
    """Drop the units of lowest `score` anywhere, in all as many as if every weight lost floor(fraction active).

    Equal scores stay in the earlier weight, and in it at the lower position. A weight that would be left without any
    unit keeps its highest one, and another goes elsewhere. A weight whose fraction is 0 loses nothing.

    Raises:
        ValueError: from the drop, where so many would go that a weight must be left empty.

    Source: the drop "global_magnitude" of the code of Dettmers and Zettlemoyer 2019, which finds its threshold by trial
    to within 2 %; here the count is exact.
    """

    def drop(weights: Sequence[SparseWeight], fractions: Sequence[float]) -> list[Topology]:
        gone = [share(f, w.topology.active) for w, f in zip(weights, fractions, strict=True)]
        places = [i for i, f in enumerate(fractions) if f > 0 and weights[i].topology.active]
        among = [weights[i] for i in places]
        held = sum(w.topology.active for w in among)
        if sum(gone) == 0:
            return [w.topology for w in weights]
        if held - sum(gone) < len(among):
            raise ValueError(
                f"dropping {sum(gone):,} of {held:,} active {_word(among)} by one threshold would leave some of "
                f"{len(among)} weights empty: at most {held - len(among):,} can go, lower the drop fraction"
            )
        scores = [unit_scores(w, score) for w in among]
        counts = at_least(1, globally)([_on_grid(w) for w in among], scores, held - sum(gone))
        kept = [w.topology for w in weights]
        for i, s, n in zip(places, scores, counts, strict=True):
            kept[i] = keep_highest(weights[i], s, n)
        return kept

    return Careful(drop, lambda weights: require_equal_units("lowest_globally", weights))


def adaptive_threshold(first: float = 1e-3, tolerance: float = 0.1) -> Drop:
    """Drop the units with |w|, pooled, <= tau and no others; the network's one tau adapts to the drop fraction.

    tau decides how many are dropped, and `drop_and_grow` grows as many. The expected number is the sum of
    floor(fraction active). If fewer than (1 - tolerance) of it were dropped, tau is doubled for the next time; if more
    than (1 + tolerance), tau is halved. A weight always keeps its largest unit. A weight whose fraction is 0 loses
    nothing and is expected to lose nothing.

    tau is remembered as `DROP_THRESHOLD` of every weight, beside how often it was used.

    Args:
        first: tau at the first drop, above 0.
        tolerance: how far off a count may be, in [0, 1).

    Raises:
        ValueError: when an argument lies outside its range; from the drop, when a value is NaN, naming the weight.

    Source: Mostafa and Wang 2019, Parameter Efficient Training of Deep Convolutional Neural Networks by Dynamic Sparse
    Reparameterization, Algorithm 1 and section 3; the drop "threshold" of the code of Dettmers and Zettlemoyer 2019,
    which scales what grows by expected over dropped and so changes the number of entries.
    """
    if not 0 < first < math.inf or not 0 <= tolerance < 1:
        raise ValueError(
            f"adaptive_threshold: the first threshold must lie above 0 and the tolerance in [0, 1), got {first:g} "
            f"and {tolerance:g}"
        )

    def drop(weights: Sequence[SparseWeight], fractions: Sequence[float]) -> list[Topology]:
        expected = sum(share(f, w.topology.active) for w, f in zip(weights, fractions, strict=True))
        if not any(fractions):
            return [w.topology for w in weights]
        # A weight that no gradient reached at the last update did not see tau change.
        tau, uses = max((_threshold(w, first) for w in weights), key=lambda pair: pair[1])
        kept = [_above(w, tau) if f > 0 else w.topology for w, f in zip(weights, fractions, strict=True)]
        dropped = sum(w.topology.active - k.active for w, k in zip(weights, kept, strict=True))
        if dropped < (1 - tolerance) * expected:
            tau = min(2 * tau, _LARGEST)
        elif dropped > (1 + tolerance) * expected:
            tau = max(tau / 2, 1 / _LARGEST)
        for weight in weights:
            DROP_THRESHOLD.set(weight, torch.tensor([tau, uses + 1], dtype=torch.float64))
        return kept

    return drop


_LARGEST = 2.0**100
"""What a threshold stays below, so that it finds its way back."""


def _threshold(weight: SparseWeight, first: float) -> tuple[float, float]:
    tau, uses = DROP_THRESHOLD.of(weight).tolist() if DROP_THRESHOLD.known(weight) else (first, 0.0)
    return tau, uses


def _above(weight: SparseWeight, tau: float) -> Topology:
    score = unit_scores(weight, magnitude).double()
    count = int((score > tau).sum())
    return keep_highest(weight, score, max(count, min(1, weight.topology.active)))


def _lowest_per_sign(weights: Sequence[SparseWeight], fractions: Sequence[float]) -> list[Topology]:
    return [_per_sign(w, f) for w, f in zip(weights, fractions, strict=True)]


def _require_single_entries(weights: Sequence[SparseWeight]) -> None:
    for weight in weights:
        if not weight.topology.is_unstructured:
            raise ValueError(
                f"{weight.name} has units of {by(weight.topology.unit)} entries, which have no one sign and are no "
                "diagonals: drop smallest, or leave out structure="
            )


lowest_per_sign: Drop = Careful(_lowest_per_sign, _require_single_entries)
"""Drop the smallest positive and the largest negative values: ceil(fraction n) of each sign, and every zero.

It is for single entries, since larger units have no one sign, and refuses a value that is NaN.

Source: Mocanu et al. 2018, Scalable training of artificial neural networks with adaptive sparse connectivity inspired
by network science, Algorithm 1 and its published code. Here a weight keeps its zeros when its fraction is 0, so that a
fraction of 0 changes nothing.
"""


def _per_sign(weight: SparseWeight, fraction: float) -> Topology:
    if fraction == 0:
        return weight.topology
    values = weight.values()
    if bool(values.isnan().any()):
        raise ValueError(f"{weight.name}: {int(values.isnan().sum()):,} of {values.numel():,} values are NaN: diverged")
    indices = weight.topology.indices.to(values.device)
    kept = []
    for of_sign in (values > 0, values < 0):
        count = int(of_sign.sum())
        chosen = weight.topology.at(indices[of_sign])
        kept.append(chosen.keep(values[of_sign].abs(), count - min(count, math.ceil(fraction * count - 1e-9))).indices)
    return weight.topology.at(torch.cat(kept).sort().values)


def lowest_diagonals(score: Score) -> Drop:
    """Drop the floor(fraction K) of a weight's K active `diagonals` of lowest mean `score`, and each as a whole.

    Raises:
        ValueError: from the drop, when a weight has diagonals of which only a part is active, naming it.

    Source: as `diagonals`; ranked as RigL ranks entries.
    """

    def drop(weights: Sequence[SparseWeight], fractions: Sequence[float]) -> list[Topology]:
        return [
            _without_diagonals(w, score, f) if f > 0 else w.topology for w, f in zip(weights, fractions, strict=True)
        ]

    return Careful(drop, _require_single_entries)


def _without_diagonals(weight: SparseWeight, score: Score, fraction: float) -> Topology:
    whole, topology = Diagonals.of(weight.shape), weight.topology
    active = active_diagonals(weight, topology)
    on = whole.at(topology.indices.cpu())
    means = torch.bincount(on, score(weight).double().cpu(), minlength=whole.number)[active] / max(1, whole.length)
    if bool(means.isnan().any()):
        raise ValueError(
            f"{weight.name}: {int(means.isnan().sum()):,} of {means.numel():,} diagonals have scores of NaN"
        )
    kept = active[selection.highest(means, active.numel() - share(fraction, active.numel()))]
    return topology.pick(torch.isin(on, kept).nonzero().view(-1).to(topology.device))


def require_equal_units(what: str, weights: Sequence[SparseWeight]) -> None:
    """Raise ValueError when `what` would trade units of different sizes between weights, naming two of them."""
    for weight in weights[1:]:
        if weight.topology.unit_size != weights[0].topology.unit_size:
            first, other = (f"{w.name} of {w.topology.unit_size}" for w in (weights[0], weight))
            raise ValueError(
                f"{what} moves units from one weight to another, and they differ in size ({first} entries, {other}): "
                "give all weights units of one size"
            )


def _on_grid(weight: SparseWeight) -> Shaped:
    """The grid of units as a weight of entries, in which an allocation counts each alike."""
    topology = weight.topology
    grid = Topology.trusted(topology.grid, topology.starts, topology.columns)
    return Shaped(weight.name, topology.grid, grid, weight.out_axis, weight.in_axis)


def _word(weights: Sequence[SparseWeight]) -> str:
    return "entries" if all(w.topology.is_unstructured for w in weights) else "units"


def share(fraction: float, count: int) -> int:
    """floor(fraction count), forgiving the representation error of products like 0.29 x 100: 1e-9, or 4 ulp if more."""
    exact = fraction * count
    return min(count, math.floor(exact + max(1e-9, 4 * math.ulp(exact))))
