"""SRigL: dynamic sparse training in which every output has as many connections, a pattern that hardware can use."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from regrow.core import selection
from regrow.core.checks import require_density, require_fraction, require_timing
from regrow.methods.recipe import recipe
from regrow.parts import (
    Allocation,
    Anneal,
    Method,
    Need,
    Rule,
    Schedule,
    SparseWeight,
    Timing,
    Topology,
    Update,
    Weights,
    best_of_each,
    by_gradient,
    by_output,
    constant_fan_in,
    cosine,
    erk,
    every,
    fan_ins,
    gradient,
    keep_highest,
    magnitude,
    outputs_of,
    random_topology,
    reached,
    require_finite,
    rewire,
    share,
)

_log = logging.getLogger("regrow")


@recipe
def srigl(
    density: float | None,
    *,
    until: int,
    begin: int | None = None,
    interval: int = 100,
    fraction: float = 0.3,
    ablation: float = 0.3,
    ablate_last: bool = False,
    anneal: Anneal = cosine,
    allocate: Allocation = erk,
    timing: Timing = "instead",
) -> Method:
    """SRigL: RigL in which every neuron has as many connections, and neurons with too few that matter go.

    An entry is salient when RigL's update would make it active. A neuron with fewer than ablation x k salient
    entries, where k is the fan-in that neurons have, loses all its connections; the others share its entries, so that
    each weight keeps its count. Fan-ins differ by at most one, where the count asks for it. Of all entries of the
    neurons that stay the largest magnitudes are kept, and each neuron is filled up where its gradient is largest.

    Args:
        ablation: the share of its fan-in that a neuron needs in salient entries to stay, in [0, 1] (the paper's
            gamma); 0 ablates none.
        ablate_last: whether the neurons of the last weight, most often the classes, may go too.

    Raises:
        ValueError: from `regrow.sparsify`, where a weight gets fewer entries than it has neurons.

    Source: Lasby et al. 2024, Dynamic Sparse Training with Structured Sparsity, section 3.1. Salience is judged anew at
    every update, as there, so that a neuron may come back. Counts are exact, where the code rounds them to equal
    fan-ins. k is the present fan-in and ablation x k is not rounded, where the code rounds down, to 1 at least;
    growth's salient entries lie outside of what is kept, where the code takes the largest gradients anywhere. So more
    neurons go here at small fan-ins. Growth may choose what was just dropped, as in RigL. A neuron that keeps more than
    its share loses its smallest magnitudes, where the code takes any. At least as many neurons stay as it takes to hold
    the weight's entries. The last weight is left out as in the code.

    Examples:
        >>> method = srigl(0.1, until=350)
        >>> [step for step in range(500) if method.due(step)]
        [100, 200, 300]
    """
    require_density("srigl", density)
    require_fraction("srigl", fraction)
    if not 0 <= ablation <= 1:
        raise ValueError(f"srigl: ablation must lie in [0, 1], got {ablation:g}: it is a share of the fan-in")
    require_timing("srigl", timing)
    update = _drop_and_grow(anneal(fraction, until, begin or 0), ablation, ablate_last)
    return Method(
        "srigl",
        random_topology(density, allocate, constant_fan_in),
        every(interval, update, begin=begin, until=until),
        timing=timing,
        needs=Need.GRADIENT,
    )


def _drop_and_grow(fraction: Schedule, ablation: float, ablate_last: bool) -> Update:
    def apply(weights: Weights, step: int) -> None:
        live = reached(weights, step)
        gammas = [ablation if ablate_last or w is not weights[-1] else 0.0 for w in live]
        rewire(live, [_updated(w, share(fraction(step), w.topology.nnz), g) for w, g in zip(live, gammas, strict=True)])

    return (Rule(apply),)


def _updated(weight: SparseWeight, dropped: int, ablation: float) -> Topology:
    """The next topology of `weight`, of which `dropped` entries are given up."""
    old = weight.topology
    if not dropped:
        return old
    score = magnitude(weight)
    kept = keep_highest(weight, score, old.nnz - dropped)
    stays = _staying(weight, kept, ablation)
    inside = stays.to(score.device)[outputs_of(old.indices.to(score.device), old.shape, weight.out_axis)]
    at = selection.highest(score.masked_fill(~inside, -1), min(old.nnz - dropped, int(inside.sum())))
    plan = _plan(weight, old.pick(at), score[at], stays)
    return plan.kept.add(_fillers(weight, plan).to(plan.kept.device))


def _staying(weight: SparseWeight, kept: Topology, ablation: float) -> Tensor:
    """Which neurons have enough salient entries, bool (outputs,); as many at least as hold the weight's entries."""
    old = weight.topology
    outputs = old.shape[weight.out_axis]
    if ablation == 0:
        return torch.ones(outputs, dtype=torch.bool)
    grown = by_gradient(weight, kept, old.nnz - kept.nnz)
    salient = fan_ins(kept.add(grown.to(kept.device)), weight.out_axis).cpu()
    there = int((fan_ins(old, weight.out_axis) > 0).sum())
    stays = salient >= ablation * old.nnz / there - 1e-9
    least = -(-old.nnz * outputs // old.numel)
    if int(stays.sum()) < least:
        _log.info(
            "%s: %d of %d neurons have enough salient entries, and %d stay to hold its %d",
            *(weight.name, int(stays.sum()), outputs, least, old.nnz),
        )
        stays[selection.highest(salient, least)] = True
    return stays


class _Plan(NamedTuple):
    """What of a weight is kept, and how its neurons are filled up."""

    kept: Topology
    lacking: Tensor
    """Entries that each neuron is to grow, (outputs,) int64."""
    open: Tensor
    """Which neurons may get one more, bool (outputs,)."""
    surplus: int
    """How many of them do."""


def _plan(weight: SparseWeight, kept: Topology, score: Tensor, stays: Tensor) -> _Plan:
    """Fan-ins that make up the weight's count; neurons that keep too many lose the smallest `score` (kept.nnz,)."""
    score = score.cpu()
    output = outputs_of(kept.indices.cpu(), kept.shape, weight.out_axis)
    have = output.bincount(minlength=len(stays))
    each, surplus = divmod(weight.topology.nnz, int(stays.sum()))
    wanted = torch.where(stays, each, 0)
    over = have > wanted
    rank = _ranks(output, score)
    following = torch.full((len(stays),), -1.0, dtype=torch.float64)
    following[output[rank == each]] = score[rank == each].double()
    winners = selection.highest(following, min(surplus, int(over.sum())))
    wanted[winners] += 1
    kept = kept.pick((rank < wanted[output]).nonzero().view(-1).to(kept.device))
    return _Plan(kept, wanted - have.minimum(wanted), stays & ~over, surplus - len(winners))


def _ranks(output: Tensor, score: Tensor) -> Tensor:
    """How many entries of the same output have a higher score, or an equal one and a lower position, all (n,)."""
    order = score.argsort(descending=True, stable=True)
    order = order[output[order].argsort(stable=True)]
    counts = output.bincount()
    rank = torch.empty_like(output)
    rank[order] = torch.arange(len(output)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    return rank


def _fillers(weight: SparseWeight, plan: _Plan) -> Tensor:
    """The positions with which neurons are filled up, where their gradients are largest."""
    outputs = weight.shape[weight.out_axis]
    certain, further = [], torch.zeros(outputs, dtype=torch.int64)
    contest = torch.full((outputs,), -1.0, dtype=torch.float64)
    for first, score in _gradients(weight, plan.kept):
        part = slice(first, first + len(score))
        lacking = plan.lacking[part].to(score.device)
        more = lacking + plan.open[part].to(score.device) * (plan.surplus > 0)
        chosen = best_of_each(score, lacking)
        certain.append(_positions(weight, chosen, first))
        row, column = (best_of_each(score, more) & ~chosen).nonzero(as_tuple=True)
        further[first + row.cpu()] = column.cpu()
        contest[first + row.cpu()] = score[row, column].double().cpu()
    winners = selection.highest(contest, plan.surplus)
    return torch.cat([*certain, _flat(weight, winners, further[winners])])


def _gradients(weight: SparseWeight, kept: Topology) -> Iterator[tuple[int, Tensor]]:
    """|g| of whole outputs, as (first output, (outputs, entries of one)), -1 where `kept` is active.

    Where outputs are not the first axis all are formed at once.
    """
    size = math.prod(weight.shape) // weight.shape[weight.out_axis]
    held: list[Tensor] = []
    low = 0
    for _, block in gradient(weight):
        score = block.abs() if block.dtype == torch.float64 else block.abs().float()
        require_finite(weight, score)
        held.append(score)
        high = low + sum(s.numel() for s in held)
        if high == math.prod(weight.shape) or (weight.out_axis == 0 and high % size == 0):
            scores = torch.cat(held)
            scores[(kept.between(low, high) - low).to(scores.device)] = -1
            yield low // size, scores.view(-1, size) if weight.out_axis == 0 else by_output(weight, scores)
            held, low = [], high


def _positions(weight: SparseWeight, chosen: Tensor, first: int) -> Tensor:
    output, column = chosen.nonzero(as_tuple=True)
    return _flat(weight, (first + output).cpu(), column.cpu())


def _flat(weight: SparseWeight, output: Tensor, column: Tensor) -> Tensor:
    """Flat positions of the entries numbered `column` of each `output`, all (n,)."""
    inner = math.prod(weight.shape[weight.out_axis + 1 :])
    return (column // inner * weight.shape[weight.out_axis] + output) * inner + column % inner
