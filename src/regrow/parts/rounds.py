"""First topologies from gradients that are asked for several times, before training.

A start in rounds lowers the density step by step: in round k of n the weights share the entries of density^(k / n).
A round ranks positions by a `Sensitivity` of the network that the round before has left. It chooses among `Candidates`:
what is left of that network, or every position.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from regrow.core import selection
from regrow.core.checks import require_density
from regrow.core.method import Allocation, Probe, Start
from regrow.core.text import some
from regrow.core.topology import Topology
from regrow.core.weight import Shaped, SparseWeight, Weights
from regrow.parts.structures import by_output, of_outputs
from regrow.parts.updates import rewire

_log = logging.getLogger("regrow")

Sensitivity = Callable[[Probe, Sequence[Tensor], Sequence[Topology]], list[Tensor]]
"""How much each position deserves to be active: (probe, first values (numel,) of each weight, what is active now) ->
(numel,) of each."""

Candidates = Callable[[Sequence[Topology]], list[Topology]]
"""What a round may choose among, by what is active now."""


def connection_sensitivity(probe: Probe, values: Sequence[Tensor], topologies: Sequence[Topology]) -> list[Tensor]:
    """|w g|, with w the first value of every position and g the gradient of the loss of the present network.

    Source: Lee et al. 2019, SNIP, equation 4; of networks that are pruned already, de Jorge et al. 2021, Progressive
    Skeletonization, equations 6 and 7.
    """
    return [(w.to(g) * g).abs() for w, g in zip(values, probe.gradients(topologies), strict=True)]


def gradient_flow(probe: Probe, values: Sequence[Tensor], topologies: Sequence[Topology]) -> list[Tensor]:
    """w (H g), with g and H the gradient and the Hessian of the loss of the dense network.

    Removing the entry lowers |g|^2 by twice as much, to first order.

    Source: Wang et al. 2020, Picking Winning Tickets Before Training by Preserving Gradient Flow, equation 8, whose
    score is the negative: what is removed there is the largest.
    """
    gradients = probe.gradients([Topology(t.shape) for t in topologies])
    return [w.to(h) * h for w, h in zip(values, probe.curvature(gradients), strict=True)]


def synaptic_flow(probe: Probe, values: Sequence[Tensor], topologies: Sequence[Topology]) -> list[Tensor]:
    """|w| dR/d|w|, with R the sum of the outputs for an input of ones and absolute values of all parameters.

    Source: Tanaka et al. 2020, Pruning neural networks without any data by iteratively conserving synaptic flow,
    equation 3 and section 6.
    """
    return [w.to(f).abs() * f for w, f in zip(values, probe.flow(topologies), strict=True)]


def remaining(topologies: Sequence[Topology]) -> list[Topology]:
    """What is active: pruned entries stay pruned; `Candidates`."""
    return list(topologies)


def every_position(topologies: Sequence[Topology]) -> list[Topology]:
    """All: pruned entries may come back; `Candidates`."""
    return [t.at(None) for t in topologies]


def in_rounds(
    name: str, density: float | None, rounds: int, score: Sensitivity, among: Candidates, allocate: Allocation
) -> Start:
    """The entries of highest `score` within the counts of `allocate`, round by round.

    Args:
        name: what errors and the log call the method.
        density: active share at the end, in (0, 1]; None leaves it to an explicit allocation, in one round.
        rounds: how often scores are asked for, 1 or more; round k leaves density^(k / rounds).
        score: of every position, by what is active now.
        among: what a round chooses among.
        allocate: shares the entries of a round among the weights.

    Weights that are left without entries are named in the log `regrow`.

    Raises:
        ValueError: when an argument is out of its range; from the start, where an allocation cannot share the entries
            of a round.
    """
    _require(name, density, rounds)

    def make(weights: Weights, probe: Probe) -> None:
        values = [_by_position(w) for w in weights]
        topologies = [w.topology.at(None) for w in weights]
        for number in range(1, rounds + 1):
            scores = score(probe, values, topologies)
            total = None if density is None else weights.total(density ** (number / rounds))
            try:
                topologies = _highest(weights, among(topologies), scores, allocate, total)
            except ValueError as error:
                raise ValueError(f"{name}: in round {number} of {rounds}: {error}") from None
        _report_empty(name, weights, topologies)
        rewire(weights, topologies)

    return Start(make, require=lambda weights: weights.require(density), needs_batches=True)


def _by_position(weight: SparseWeight) -> Tensor:
    """The values of a weight with its zeros, (numel,)."""
    values = weight.values()
    return values.new_zeros(weight.topology.numel).index_copy_(0, weight.topology.entries.to(values.device), values)


def _highest(
    weights: Weights,
    candidates: Sequence[Topology],
    scores: Sequence[Tensor],
    allocate: Allocation,
    total: int | None,
) -> list[Topology]:
    sized = [Shaped(w.name, w.shape, t, w.out_axis, w.in_axis) for w, t in zip(weights, candidates, strict=True)]
    active = [s[t.entries.to(s.device)] for s, t in zip(scores, candidates, strict=True)]
    among = [t.pooled(s, w.pool) for w, t, s in zip(weights, candidates, active, strict=True)]
    counts = allocate(sized, among, total)
    return [t.keep(s, n) for t, s, n in zip(candidates, among, counts, strict=True)]


def _report_empty(name: str, weights: Weights, topologies: Sequence[Topology]) -> None:
    empty = [w.name for w, t in zip(weights, topologies, strict=True) if not t.nnz]
    if empty:
        _log.warning(
            "%s: %d of %d weights are left without any entry (%s), and nothing passes them: raise the density, or "
            "allocate at_least(1, globally)",
            *(name, len(empty), len(weights), some(empty)),
        )


def outputs_in_rounds(name: str, density: float | None, rounds: int, prune_last: bool) -> Start:
    """Whole outputs, neurons or filters, of highest |sum of w g over their entries|, round by round.

    Outputs of all weights are ranked together. The number of outputs that stay in round k is the one whose entries come
    nearest to those of density^(k / rounds); of two equally near numbers it is the smaller. Each weight keeps at least
    its best output.

    Args:
        name: what errors call the method.
        density: active share at the end, in (0, 1].
        rounds: how often gradients are asked for, 1 or more.
        prune_last: whether outputs of the last parameter may go; if not it stays dense.

    Raises:
        ValueError: when an argument is out of its range; from `require`, when more entries must stay than the density
            says.
    """
    if density is None:
        raise ValueError(f"{name}: give a density: whole outputs have no allocation that says one")
    _require(name, density, rounds)

    def require(weights: Weights) -> None:
        weights.require(density)
        kept = _kept_whole(weights, prune_last)
        least = sum(w.topology.numel // (1 if k else _outputs(w)) for w, k in zip(weights, kept, strict=True))
        total = weights.total(density)
        if least > total:
            held = [w.name for w, k in zip(weights, kept, strict=True) if k]
            whole = f" and all of {some(held)}" if held else ""
            raise ValueError(
                f"{name}: one output of each weight{whole} take {least:,} of {weights.numel:,} entries, and density "
                f"{density:g} leaves {total:,}: raise the density{', or give prune_last=True' if held else ''}"
            )

    def make(weights: Weights, probe: Probe) -> None:
        kept = _kept_whole(weights, prune_last)
        pruned = [w for w, k in zip(weights, kept, strict=True) if not k]
        whole = weights.numel - sum(w.topology.numel for w in pruned)
        values = [w.values() for w in weights]
        alive = [torch.ones(_outputs(w), dtype=torch.bool) for w in pruned]
        topologies = [Topology(w.shape) for w in weights]
        for number in range(1, rounds + 1):
            gradients = probe.gradients(topologies)
            products = [w.to(g).double() * g.double() for w, g in zip(values, gradients, strict=True)]
            gates = [_gate(w, p) for w, p, k in zip(weights, products, kept, strict=True) if not k]
            alive = _best_outputs(pruned, gates, alive, weights.total(density ** (number / rounds)) - whole)
            chosen = iter(alive)
            topologies = [
                Topology(w.shape) if k else _whole_outputs(w, next(chosen)) for w, k in zip(weights, kept, strict=True)
            ]
        rewire(weights, topologies)

    return Start(make, require=require, needs_batches=True)


def _kept_whole(weights: Weights, prune_last: bool) -> list[bool]:
    """Which weights lose no output: the blocks of the last parameter, where it is to be spared."""
    last = weights[-1].name.partition("[")[0]
    return [not prune_last and w.name.partition("[")[0] == last for w in weights]


def _outputs(weight: SparseWeight) -> int:
    return weight.shape[weight.out_axis]


def _gate(weight: SparseWeight, products: Tensor) -> Tensor:
    """|sum over the entries of each output| of `products` (numel,), (outputs,) float64.

    On the CPU, since on a GPU the order of a sum, and with it a near tie, is not the same in every run.
    """
    return by_output(weight, products.cpu()).sum(1).abs()


def _best_outputs(
    weights: Sequence[SparseWeight], gates: Sequence[Tensor], alive: Sequence[Tensor], total: int
) -> list[Tensor]:
    """Which outputs stay, bool (outputs,) of each weight; those that are not `alive` never do."""
    if not weights:
        return []
    ranked = [g.masked_fill(~a, -1) for g, a in zip(gates, alive, strict=True)]
    for gate in ranked:
        gate[selection.highest(gate, 1)] = torch.inf
    sizes = torch.cat(
        [torch.full_like(a, w.topology.numel // len(a), dtype=torch.int64) for w, a in zip(weights, alive, strict=True)]
    )
    order = torch.cat(ranked).argsort(descending=True, stable=True)
    reached = sizes[order].cumsum(0)
    fewest, most = len(weights), sum(int(a.sum()) for a in alive)
    taken = fewest + int((reached[fewest - 1 : most] - total).abs().argmin())
    chosen = torch.zeros(len(order), dtype=torch.bool)
    chosen[order[:taken]] = True
    return list(torch.split(chosen, [len(a) for a in alive]))


def _whole_outputs(weight: SparseWeight, chosen: Tensor) -> Topology:
    """All entries of the outputs that are `chosen`, bool (outputs,)."""
    return of_outputs(weight, chosen[:, None].expand(-1, weight.topology.numel // len(chosen)))


def _require(name: str, density: float | None, rounds: int) -> None:
    require_density(name, density)
    if rounds < 1:
        raise ValueError(f"{name}: rounds must be at least 1, got {rounds}")
    if density is None and rounds > 1:
        raise ValueError(
            f"{name}: {rounds} rounds lower one density step by step, and None is given: give a density, or rounds=1 "
            "with an explicit allocation"
        )
