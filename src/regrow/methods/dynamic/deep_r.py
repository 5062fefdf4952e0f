"""DEEP R."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from regrow.core import selection
from regrow.core.checks import require_density
from regrow.methods.drop_grow import reads
from regrow.methods.recipe import recipe
from regrow.parts import (
    Allocation,
    Growth,
    Method,
    Rule,
    SparseWeight,
    Statistic,
    Update,
    Weights,
    at_random,
    every,
    grown_counts,
    random_topology,
    reached,
    rewire,
    signed,
    signs,
    uniform,
)


@recipe
def deep_r(
    density: float | None,
    *,
    until: int,
    l1: float = 5e-6,
    noise: float = 5e-6,
    grow: Growth = at_random,
    redistribute: Statistic | None = None,
    decay: float | None = None,
    allocate: Allocation = uniform,
) -> Method:
    """DEEP R: every position has a fixed sign; an entry that would change it is dropped, another grows at random.

    With s the sign and t = s w, every optimizer step is followed by t <- t - l1 + noise n, n of variance 1. Entries
    with t < 0 are dropped, and as many are grown at zero, at once: counts are exact at every step.

    Args:
        until: optimizer step from which the topology is fixed. Signs are free from then on.
        l1: what every active entry shrinks by in a step, at least 0: the paper's eta alpha.
        noise: standard deviation of the noise of a step, at least 0: the paper's sqrt(2 eta T).

    Source: Bellec et al. 2018, Deep Rewiring: Training very sparse deep networks, Algorithm 1. In the paper eta is the
    learning rate; here l1 and noise are those of one step and do not follow it (the defaults are those of the published
    code in its first epoch, 1e-5 times its learning rate of 0.5). First values are the modules' own with the sign of
    their position. The gradient's part of the step is the optimizer's, momentum included. New entries start at 0, in
    the code at 1e-12.

    Examples:
        >>> method = deep_r(0.1, until=350)
        >>> method.due(1), method.due(349), method.due(350)
        (True, True, False)
    """
    require_density("deep_r", density)
    if not 0 <= l1 < math.inf or not 0 <= noise < math.inf:
        raise ValueError(f"deep_r: l1 and noise must be finite and at least 0, got l1 {l1:g} and noise {noise:g}")
    needs, observe = reads("deep_r", grow, redistribute, decay)
    update = every(1, _walk(l1, noise, grow, redistribute), until=until)
    start = signed(random_topology(density, allocate))
    return Method("deep_r", start, update, observe=observe, timing="after", needs=needs)


def _walk(l1: float, noise: float, grow: Growth, redistribute: Statistic | None) -> Update:
    """One step of the random walk of all active entries, and the rewiring that it makes necessary."""

    def apply(weights: Weights, step: int) -> None:
        live = reached(weights, step)
        moved = [_moved(w, l1, noise) for w in live]
        kept = [w.topology.pick((t >= 0).nonzero().view(-1)) for w, t in zip(live, moved, strict=True)]
        counts = grown_counts(live, kept, kept, redistribute)
        grown = [k.add(grow(w, k, n)) if n else k for w, k, n in zip(live, kept, counts, strict=True)]
        for weight, t in zip(live, moved, strict=True):
            weight.set_values(signs(weight, t) * t)
        rewire(live, kept)
        rewire(live, grown)

    return (Rule(apply),)


def _moved(weight: SparseWeight, l1: float, noise: float) -> Tensor:
    """t - l1 + noise n, (nnz,) float64.

    Raises:
        ValueError: when a value is not finite, naming the weight.
    """
    values = weight.values().double()
    if not selection.is_finite(values):
        bad = int((~values.isfinite()).sum())
        raise ValueError(f"{weight.name}: {bad:,} of {values.numel():,} values are not finite: training has diverged")
    drawn = torch.from_numpy(weight.generator.normal(values.numel())).to(values.device)
    return signs(weight, values) * values - l1 + noise * drawn
