"""How the first topologies are made: dense, at random from shapes alone, from scores, or from a trained model.

A start is a value: `methods.rigl(0.1, until=1000)._replace(start=prune_global(0.1))` begins where training left off.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from regrow.core.checks import require_density, require_fraction
from regrow.core.method import Allocation, Probe, Score, Start, Structure
from regrow.core.text import by
from regrow.core.topology import Topology, fan_in_scale
from regrow.core.units import from_index
from regrow.core.weight import SparseWeight, Weights
from regrow.parts.allocation import globally, uniform
from regrow.parts.drops import share
from regrow.parts.growth import gradient
from regrow.parts.scores import magnitude
from regrow.parts.structures import rows, unstructured
from regrow.parts.updates import everywhere, prune_to, rewire


def dense() -> Start:
    """Every entry is active."""
    return Start(lambda weights, probe: None)


def random_topology(density: float | None, allocate: Allocation, structure: Structure | None = None) -> Start:
    """Uniformly random units with exact counts, sampled in O(active) from shapes alone.

    Density None leaves the counts to an `explicit` allocation. A `structure` gets a random score of every position,
    at O(numel) for one weight at a time.

    Source: Mocanu et al. 2018, equation 1, with exact counts where the published code draws every entry by itself.
    """

    def drawn(weight: SparseWeight, count: int) -> Topology:
        all_of_it = weight.topology.at(None)
        if count == all_of_it.places:
            return all_of_it
        if structure is not None:
            draws = torch.from_numpy(weight.generator.uniform(weight.topology.numel))
            return structure(weight, everywhere(weight, draws), count)
        return all_of_it.at(torch.from_numpy(weight.generator.subset(all_of_it.places, count)))

    def make(weights: Weights, probe: Probe) -> None:
        total = None if density is None else weights.total(density)
        counts = allocate(weights, None, total)
        rewire(weights, [drawn(w, n) for w, n in zip(weights, counts, strict=True)])

    return Start(make, require=lambda weights: weights.require(density))


def random_fan_in(density: float | None, allocate: Allocation) -> Start:
    """Uniformly random units, as many at each output: fan-ins differ by one where the count asks for it, earlier first.

    With larger units an output is a row of units, a group of outputs that share their inputs.

    Args:
        density: active share of the sparsified entries; None leaves it to an `explicit` allocation.
        allocate: how the active entries are shared among the weights.

    Source: Schultheis and Babbar 2023, Towards Memory-Efficient Training for Extremely Large Output Spaces, section 3;
    the code of HASTE (Group-shared Fixed Fan-in, 2026).
    """

    def drawn(weight: SparseWeight, count: int) -> Topology:
        whole = weight.topology.at(None)
        outputs = whole.grid[weight.out_axis]
        size = whole.places // outputs
        fan_ins = [count // outputs + (i < count % outputs) for i in range(outputs)]
        mask = torch.zeros(outputs, size, dtype=torch.bool)
        for output, fan_in in enumerate(fan_ins):
            mask[output, torch.from_numpy(weight.generator.subset(size, fan_in))] = True
        return whole.at(from_index(whole.grid, weight.out_axis, mask).nonzero().view(-1))

    def make(weights: Weights, probe: Probe) -> None:
        counts = allocate(weights, None, None if density is None else weights.total(density))
        rewire(weights, [drawn(w, n) for w, n in zip(weights, counts, strict=True)])

    return Start(make, require=lambda weights: weights.require(density))


def given(topologies: Mapping[str, Topology]) -> Start:
    """These topologies, with the values that the model has: a mask without the weights it was found with.

    Args:
        topologies: of every weight by its canonical name, as `Sparsifier.topologies` has them.

    Raises:
        ValueError: from the start, for names or shapes that are not those of the model.

    Source: Frankle and Carbin 2019, The Lottery Ticket Hypothesis, section 2 (its controls transfer the mask alone).
    """

    def require(weights: Weights) -> None:
        shapes, units = {w.name: w.shape for w in weights}, {w.name: w.topology.unit for w in weights}
        missing, unknown = [n for n in shapes if n not in topologies], [n for n in topologies if n not in shapes]
        if missing or unknown:
            raise ValueError(
                f"given: of {len(shapes)} weights {len(missing)} have no topology ({', '.join(missing[:3]) or 'none'}) "
                f"and {len(unknown)} topologies no weight ({', '.join(unknown[:3]) or 'none'}): sparsify the same "
                "parts of the same model, with the same skip= and only="
            )
        for name, shape in shapes.items():
            if topologies[name].unit != units[name]:
                raise ValueError(
                    f"given: {name} is made of units of {by(units[name])} entries, and its topology of "
                    f"{by(topologies[name].unit)}: give the method the structure= that it was found with"
                )
            if topologies[name].shape != shape:
                raise ValueError(f"given: {name} has shape {shape}, and its topology {topologies[name].shape}")

    def make(weights: Weights, probe: Probe) -> None:
        rewire(weights, [topologies[w.name] for w in weights])

    return Start(make, require=require)


def by_score(
    density: float | None,
    score: Score,
    allocate: Allocation,
    *,
    needs_gradient: bool = False,
    structure: Structure | None = None,
) -> Start:
    """The entries of highest `score` within the counts of `allocate`, in patterns of a `structure` if there is one."""

    def make(weights: Weights, probe: Probe) -> None:
        prune_to(weights, None if density is None else weights.total(density), score, allocate, structure)

    return Start(make, needs_gradient, lambda weights: weights.require(density))


def prune_uniform(density: float) -> Start:
    """The largest magnitudes of a trained model, at the same density in every weight.

    Args:
        density: active share of the sparsified entries, in (0, 1].

    Source: Han et al. 2015, Learning both Weights and Connections, section 3, in one shot; Liu et al. 2021, Sparse
    Training via Boosting Pruning Plasticity with Neuroregeneration, section 3. Counts are exact where the latter's
    code keeps a fraction of what is not zero, and ties go to the lower position.
    """
    return _pruned("prune_uniform", density, uniform)


def prune_global(density: float) -> Start:
    """The largest magnitudes of a trained model, wherever they are.

    Args:
        density: active share of the sparsified entries, in (0, 1].

    Source: as `prune_uniform`. The count is exact. The code's threshold keeps ties, and keeps a whole model when it is
    zero.
    """
    return _pruned("prune_global", density, globally)


def prune_structured(density: float, last: Structure = unstructured) -> Start:
    """Whole outputs of a trained model: neurons or filters of largest mean magnitude, as many in every weight.

    Counts are the nearest to the density that whole outputs allow. The last weight keeps every output, since an output
    without inputs would be a class that is never predicted; it loses its smallest magnitudes instead.

    Args:
        density: active share of the sparsified entries, in (0, 1].
        last: the structure of the last weight in module order; `rows` takes whole outputs there too.

    Source: Li et al. 2017, Pruning Filters for Efficient ConvNets, section 3; Liu et al. 2021, Neuroregeneration,
    section 3. Entries that read a removed output stay active.
    """
    return _pruned("prune_structured", density, uniform, rows, last)


def prune_and_grow_uniform(density: float, fraction: float = 0.5) -> Start:
    """Prune as `prune_uniform` does, then give up a fraction at once for the positions of largest gradient.

    Each weight gives up the floor(fraction nnz) smallest of the magnitudes that it kept. As many positions become
    active where |g| of the whole trained model is largest; an entry that was just given up may be among them. New
    entries begin at zero, with the optimizer's state at zero too.

    Args:
        density: active share of the sparsified entries, in (0, 1].
        fraction: the share that is given up, in [0, 1].

    Source: Liu et al. 2021, Neuroregeneration, section 3. Here the start itself asks for the gradient; the code
    expects it from a caller that never gives it. The gradient is that of the model before pruning, and the total is
    what `density` says, where the code grows all that it pruned.
    """
    return _pruned_and_grown("prune_and_grow_uniform", density, fraction, uniform)


def prune_and_grow_global(density: float, fraction: float = 0.5) -> Start:
    """Prune as `prune_global` does, then give up a fraction of each weight at once for its largest gradients.

    Args:
        density: active share of the sparsified entries, in (0, 1].
        fraction: the share that is given up, in [0, 1].

    Source: as `prune_and_grow_uniform`.
    """
    return _pruned_and_grown("prune_and_grow_global", density, fraction, globally)


def prune_and_grow_structured(density: float, fraction: float = 0.5, last: Structure = unstructured) -> Start:
    """Prune as `prune_structured` does, then give up a fraction of the outputs for those of largest mean |g|.

    Args:
        density: active share of the sparsified entries, in (0, 1].
        fraction: the share that is given up, in [0, 1], to the nearest whole output.
        last: the structure of the last weight in module order, as for `prune_structured`.

    Source: as `prune_and_grow_uniform`; the code accepts the name and makes nothing sparse.
    """
    return _pruned_and_grown("prune_and_grow_structured", density, fraction, uniform, rows, last)


def _pruned(
    name: str,
    density: float,
    allocate: Allocation,
    structure: Structure = unstructured,
    last: Structure = unstructured,
) -> Start:
    require_density(name, density)

    def make(weights: Weights, probe: Probe) -> None:
        rewire(weights, _largest(weights, density, allocate, structure, last))

    return Start(make, require=lambda weights: _require_trained(name, weights, density))


def _pruned_and_grown(
    name: str,
    density: float,
    fraction: float,
    allocate: Allocation,
    structure: Structure = unstructured,
    last: Structure = unstructured,
) -> Start:
    require_density(name, density)
    require_fraction(name, fraction)

    def make(weights: Weights, probe: Probe) -> None:
        kept, grown = [], []
        pruned = _largest(weights, density, allocate, structure, last)
        for weight, topology, pattern in zip(weights, pruned, _patterns(weights, structure, last), strict=True):
            stays = topology.nnz - share(fraction, topology.nnz)
            score = everywhere(weight, magnitude(weight))
            rest = pattern(weight, score, stays) if stays else Topology(weight.shape, _no_positions())
            kept.append(rest)
            grown.append(_grown(weight, rest, topology.nnz - rest.nnz, pattern))
        rewire(weights, kept)
        rewire(weights, grown)

    return Start(make, needs_gradient=True, require=lambda weights: _require_trained(name, weights, density))


def _grown(weight: SparseWeight, kept: Topology, count: int, pattern: Structure) -> Topology:
    """`kept` with `count` entries more, where the gradient is largest."""
    if not count:
        return kept
    score = torch.cat([block.abs() for _, block in gradient(weight)])
    score[kept.indices.to(score.device)] = -math.inf
    return kept.add(pattern(weight, score, count).indices.to(kept.device))


def _largest(
    weights: Weights, density: float, allocate: Allocation, structure: Structure, last: Structure
) -> list[Topology]:
    """The largest magnitudes of each weight within the counts of `allocate`, in the patterns that are allowed."""
    scores = [magnitude(w) for w in weights]
    counts = allocate(weights, scores, weights.total(density))
    patterns = _patterns(weights, structure, last)
    return [pattern(w, everywhere(w, s), n) for w, s, n, pattern in zip(weights, scores, counts, patterns, strict=True)]


def _patterns(weights: Weights, structure: Structure, last: Structure) -> list[Structure]:
    return [structure] * (len(weights) - 1) + [last]


def _no_positions() -> Tensor:
    return torch.empty(0, dtype=torch.int64)


def _require_trained(name: str, weights: Weights, density: float) -> None:
    weights.require(density)
    blank = [w.name for w in weights if w.values().is_meta]
    if blank:
        raise ValueError(
            f"{name}: {len(blank)} of {len(weights)} weights lie on the meta device and have no values "
            f"({', '.join(blank[:3])}): load the trained model on a real device first"
        )


def scale_to_fan_in(weights: Weights) -> None:
    """Scale first values to the fan-in that each output really has: by sqrt(dense fan-in / active fan-in).

    Source: Evci et al. 2022, Gradient Flow in Sparse Neural Networks and How Lottery Tickets Win, section 3.1.
    """
    for weight in weights:
        values = weight.values()
        scale = fan_in_scale(weight.topology, weight.out_axis).to(values.device)
        weight.set_values((values.double() * scale).to(values.dtype))


def signed(start: Start) -> Start:
    """`start`, after which every active value has the sign of its position, a hash of seed, name and position.

    Raises:
        ValueError: from the start, for a weight on the meta device, whose values do not exist yet, naming it.

    Source: Bellec et al. 2018, Deep Rewiring, Algorithm 1, whose connections have a sign for good.
    """

    def make(weights: Weights, probe: Probe) -> None:
        for weight in weights:
            if weight.values().is_meta:
                raise ValueError(
                    f"{weight.name} lies on the meta device and has no values that could take their signs: build the "
                    "model on a real device"
                )
        start.make(weights, probe)
        for weight in weights:
            values = weight.values().abs()
            weight.set_values(values * signs(weight, values))

    return start._replace(make=make)


def signs(weight: SparseWeight, like: Tensor) -> Tensor:
    """The sign of each active position, (nnz,) in the dtype and on the device of `like`."""
    return torch.from_numpy(weight.generator.signs(weight.topology.entries.cpu().numpy())).to(like)
