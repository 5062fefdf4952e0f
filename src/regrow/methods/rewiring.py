"""Dynamic sparse training with drops and growths of its own: by one threshold, by sign, in a sampled subset."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from regrow.core import selection
from regrow.core.checks import require_density, require_dynamic
from regrow.core.method import Allocation, Growth, Method, Need, Probe, Regrow, Rule, Score, Start, Timing, Update
from regrow.core.topology import Topology
from regrow.core.weight import SparseWeight, Weights
from regrow.methods.dynamic import Anneal
from regrow.parts import growth, starts
from regrow.parts.allocation import apportion, er, uniform
from regrow.parts.drops import adaptive_threshold, keep_highest, lowest, share
from regrow.parts.redistribution import survivors
from regrow.parts.schedules import Schedule, constant, cosine, linear
from regrow.parts.scores import magnitude, magnitude_and_gradient
from regrow.parts.updates import drop_and_grow, every, reached, rewire

_log = logging.getLogger("regrow")


def dsr(
    density: float | None,
    *,
    until: int,
    begin: int | None = None,
    interval: int = 100,
    fraction: float = 0.1,
    threshold: float = 1e-3,
    tolerance: float = 0.1,
    allocate: Allocation = uniform,
    regrow_dropped: Regrow = "reset",
    timing: Timing = "after",
) -> Method:
    """DSR: drop what lies under one threshold for all weights, grow at random where most entries survived.

    Args:
        density: active share of the sparsified entries, in (0, 1]; None leaves it to an explicit allocation.
        until: optimizer step from which the topology is fixed.
        begin: optimizer step of the first update; None means `interval`.
        interval: optimizer steps between two updates; the paper begins with 100 and lengthens it up to 800.
        fraction: share of active entries that each update should drop, in [0, 1]; the threshold follows it.
        threshold: on |w| at the first update, above 0.
        tolerance: how far off that count may be before the threshold is doubled or halved, in [0, 1).
        allocate: how the active entries are shared among the weights at the start.
        regrow_dropped: "keep", "reset" or "forbid" entries that are dropped and would grow again at once.
        timing: the update comes "after" an optimizer step, as in the paper, or "instead" of one.

    Source: Mostafa and Wang 2019, Parameter Efficient Training of Deep Convolutional Neural Networks by Dynamic Sparse
    Reparameterization, Algorithm 1. The paper's target is a number of entries (20,000 for WRN-28-2), here a share of
    those that are active. What a weight has no room for goes to the others in proportion; the code repeats and rounds
    until all are placed, and forbids entries dropped in the same update.

    Examples:
        >>> dsr(0.1, until=350).needs
        <Need.ROOM: 16>
    """
    require_dynamic("dsr", density, fraction, regrow_dropped, timing)
    if not 0 < threshold < math.inf or not 0 <= tolerance < 1:
        raise ValueError(
            f"dsr: threshold must lie above 0 and tolerance in [0, 1), got threshold {threshold:g}, tolerance "
            f"{tolerance:g}"
        )
    drop = adaptive_threshold(threshold, tolerance)
    update = drop_and_grow(constant(fraction), drop, growth.at_random, survivors, regrow_dropped)
    return Method(
        "dsr",
        starts.random_topology(density, allocate),
        every(interval, update, begin=begin, until=until),
        timing=timing,
        needs=Need.ROOM,
    )


def mest(
    density: float | None,
    *,
    until: int,
    begin: int | None = None,
    interval: int = 1000,
    fraction: float = 0.2,
    anneal: Anneal = linear,
    gradient_weight: float = 1.0,
    soft: bool = False,
    allocate: Allocation = uniform,
    regrow_dropped: Regrow = "reset",
    timing: Timing = "after",
) -> Method:
    """MEST: drop where |w| + gradient_weight |g| is smallest, grow at random, less and less (elastic mutation).

    Args:
        density: active share of the sparsified entries, in (0, 1]; None leaves it to an explicit allocation.
        until: optimizer step from which the topology is fixed and the density exact; the paper takes three quarters
            of the run.
        begin: optimizer step of the first update; None means `interval`.
        interval: optimizer steps between two updates; the paper updates every 5 epochs.
        fraction: share of active entries dropped at first, in [0, 1]; soft, the share grown beyond the density.
        anneal: how that share falls: `linear`, `cosine`, `constant`, `inverse_power`.
        gradient_weight: the paper's lambda, at least 0; 0 ranks magnitudes alone, as the published scripts do.
        soft: a soft memory bound (EM&S): entries are grown beyond the density, trained to the next update, and only
            then the lowest of all are dropped. At `until` the last of these goes.
        allocate: how the active entries are shared among the weights at the start.
        regrow_dropped: "keep", "reset" or "forbid" entries that are dropped and would grow again at once.
        timing: the update comes "after" an optimizer step, as in the paper's code, or "instead" of one.

    Source: Yuan et al. 2021, MEST: Accurate and Fast Memory-Economic Sparse Training Framework on the Edge, sections
    3.2 and 3.3. The published scripts lower the share in three stages (20 %, 10 %, none of the active entries at
    density 0.1), here it falls smoothly. Counts are exact where the code compares with a percentile. Soft, a weight
    holds at most twice what it started with; what it has no room for is grown in the others and told in the log.

    Examples:
        >>> method = mest(0.1, until=3500, soft=True)
        >>> [step for step in range(5000) if method.due(step)]
        [1000, 2000, 3000, 3500]
    """
    require_dynamic("mest", density, fraction, regrow_dropped, timing)
    if not 0 <= gradient_weight < math.inf:
        raise ValueError(f"mest: gradient_weight must be finite and at least 0, got {gradient_weight:g}")
    score, shares = magnitude_and_gradient(gradient_weight), anneal(fraction, until, begin or 0)
    if soft:
        update = _overshoot(shares, score, growth.at_random, until, regrow_dropped)
    else:
        update = drop_and_grow(shares, lowest(score), growth.at_random, regrow_dropped=regrow_dropped)
    return Method(
        "mest",
        starts.random_topology(density, allocate),
        every(interval, update, begin=begin, until=until),
        timing=timing,
        needs=Need.OVERSHOOT if soft else Need.NOTHING,
    )


def _overshoot(fraction: Schedule, score: Score, grow: Growth, until: int, regrow_dropped: Regrow) -> Update:
    """Drop back to the number of entries at the start, then grow a fraction of it beyond; at `until` only drop.

    State "target", int64 (), of each weight is that number.
    """

    def apply(weights: Weights, step: int) -> None:
        live = reached(weights, step) if step < until else list(weights)
        for w in live:
            w.state.setdefault("target", torch.tensor(w.topology.nnz))
        targets = [int(w.state["target"]) for w in live]
        kept = [
            keep_highest(w, score(w), n) if n < w.topology.nnz else w.topology
            for w, n in zip(live, targets, strict=True)
        ]
        taken = [w.topology if regrow_dropped == "forbid" else k for w, k in zip(live, kept, strict=True)]
        counts = _beyond(live, taken, targets, fraction(step) if step < until else 0.0, step)
        grown = [k.add(grow(w, t, n)) if n else k for w, k, t, n in zip(live, kept, taken, counts, strict=True)]
        if regrow_dropped == "reset":
            rewire(live, kept)
        rewire(live, grown)

    return (Rule(apply, last=until),)


def _beyond(
    live: Sequence[SparseWeight], taken: Sequence[Topology], targets: Sequence[int], fraction: float, step: int
) -> list[int]:
    """How many entries each weight grows beyond its target: floor(fraction target) where there is room for them."""
    wanted = [share(fraction, n) for n in targets]
    room = [min(n, t.numel - t.nnz) for n, t in zip(targets, taken, strict=True)]
    counts = apportion(wanted, min(sum(wanted), sum(room)), room)
    for w, asked, given in zip(live, wanted, counts, strict=True):
        if given < asked:
            _log.warning(
                "step %d: %s has room for %d of %d entries beyond its density: %d grow in all, of %d",
                *(step, w.name, given, asked, sum(counts), sum(wanted)),
            )
    return counts


def deep_r(
    density: float | None,
    *,
    until: int,
    l1: float = 5e-6,
    noise: float = 5e-6,
    allocate: Allocation = uniform,
) -> Method:
    """DEEP R: every position has a fixed sign; an entry that would change it is dropped, another grows at random.

    With s the sign and t = s w, every optimizer step is followed by t <- t - l1 + noise n, n of variance 1. Entries
    with t < 0 are dropped, and as many are grown at zero, at once, in the same weight: counts are exact at every step.

    Args:
        density: active share of the sparsified entries, in (0, 1]; None leaves it to an explicit allocation.
        until: optimizer step from which the topology is fixed; signs are free from then on.
        l1: what every active entry shrinks by in a step, at least 0: the paper's eta alpha.
        noise: standard deviation of the noise of a step, at least 0: the paper's sqrt(2 eta T).
        allocate: how the active entries are shared among the weights at the start.

    Source: Bellec et al. 2018, Deep Rewiring: Training very sparse deep networks, Algorithm 1. In the paper eta is the
    learning rate; here l1 and noise are those of a step and stay what they are (the defaults are those of the published
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
    start = _signed(starts.random_topology(density, allocate))
    return Method("deep_r", start, every(1, _walk(l1, noise), until=until), timing="after")


def _signs(weight: SparseWeight, like: Tensor) -> Tensor:
    """The sign of each active position, (nnz,) in the dtype and on the device of `like`."""
    return torch.from_numpy(weight.generator.signs(weight.topology.indices.cpu().numpy())).to(like)


def _signed(start: Start) -> Start:
    """`start`, after which every active value has the sign of its position."""

    def make(weights: Weights, probe: Probe) -> None:
        for weight in weights:
            if weight.values().is_meta:
                raise ValueError(
                    f"deep_r: {weight.name} lies on the meta device and has no values that could take their signs: "
                    "build the model on a real device"
                )
        start.make(weights, probe)
        for weight in weights:
            values = weight.values().abs()
            weight.set_values(values * _signs(weight, values))

    return start._replace(make=make)


def _walk(l1: float, noise: float) -> Update:
    """One step of the random walk of all active entries, and the rewiring that it makes necessary."""

    def apply(weights: Weights, step: int) -> None:
        live = reached(weights, step)
        moved = [_moved(w, l1, noise) for w in live]
        kept = [w.topology.pick((t >= 0).nonzero().view(-1)) for w, t in zip(live, moved, strict=True)]
        lost = [w.topology.nnz - k.nnz for w, k in zip(live, kept, strict=True)]
        grown = [k.add(growth.at_random(w, k, n)) if n else k for w, k, n in zip(live, kept, lost, strict=True)]
        for weight, t in zip(live, moved, strict=True):
            weight.set_values(_signs(weight, t) * t)
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
    return _signs(weight, values) * values - l1 + noise * drawn


def gse(
    density: float | None,
    *,
    until: int,
    begin: int | None = None,
    interval: int = 1000,
    fraction: float = 0.2,
    anneal: Anneal = cosine,
    gamma: float = 1.0,
    allocate: Allocation = er,
    regrow_dropped: Regrow = "forbid",
    timing: Timing = "after",
) -> Method:
    """GSE: drop the smallest magnitudes, grow where the gradient is largest in a random subset of the inactive entries.

    With compressed storage an update costs time and memory for (1 + gamma) nnz entries; no dense gradient is formed.

    Args:
        density: active share of the sparsified entries, in (0, 1]; None leaves it to an explicit allocation.
        until: optimizer step from which the topology is fixed; the paper takes 120 of 200 epochs.
        begin: optimizer step of the first update; None means `interval`.
        interval: optimizer steps between two updates.
        fraction: share of active entries dropped at first, in [0, 1].
        anneal: how that share moves: `cosine`, `constant`, `linear`, `inverse_power`.
        gamma: candidates per active entry, at least `fraction`.
        allocate: how the active entries are shared among the weights at the start.
        regrow_dropped: "keep", "reset" or "forbid" entries that are dropped and would grow again at once.
        timing: the update comes "after" an optimizer step or "instead" of one.

    Source: Heddes et al. 2024, Always-Sparse Training by Growing Connections with Guided Stochastic Exploration,
    Algorithm 1 with uniform sampling. The published code compares all weights with each other by default, here each
    weight keeps its count; its gradient is that of extra batches, here of the step's own. Candidates are drawn among
    the inactive entries alone and without repetition. The code reads a convolution as a matrix before it takes ER.

    Examples:
        >>> gse(0.1, until=3500).needs
        <Need.GRADIENT: 1>
    """
    require_dynamic("gse", density, fraction, regrow_dropped, timing)
    if not fraction <= gamma < math.inf:
        raise ValueError(
            f"gse: gamma {gamma:g} gives fewer candidates than the drop fraction {fraction:g} asks to grow: raise "
            "gamma or lower fraction"
        )
    update = drop_and_grow(
        anneal(fraction, until, begin or 0), lowest(magnitude), sampled_gradient(gamma), regrow_dropped=regrow_dropped
    )
    return Method(
        "gse",
        starts.random_topology(density, allocate),
        every(interval, update, begin=begin, until=until),
        timing=timing,
        needs=Need.GRADIENT,
    )


def sampled_gradient(gamma: float) -> Growth:
    """Grow where |gradient| is largest among floor(gamma nnz) candidates drawn uniformly outside the taken entries.

    There are never fewer candidates than entries to grow, nor more than there are. The gradient is read at the
    candidates alone. Equal values go to the lower position.

    Args:
        gamma: candidates per active entry, finite and at least 0.

    Raises:
        ValueError: from the growth, when a gradient is not finite, naming the weight.

    Source: Heddes et al. 2024, section 3.
    """
    if not 0 <= gamma < math.inf:
        raise ValueError(f"sampled_gradient: gamma must be finite and at least 0, got {gamma:g}")

    def grow(weight: SparseWeight, taken: Topology, count: int) -> Tensor:
        free = taken.numel - taken.nnz
        candidates = growth.at_random(weight, taken, min(free, max(count, math.floor(gamma * weight.topology.nnz))))
        score = weight.grads_at(candidates).abs()
        if not selection.is_finite(score):
            bad = int((~score.isfinite()).sum())
            raise ValueError(
                f"{weight.name}: {bad:,} of {score.numel():,} growth scores are not finite: lower the learning rate, "
                "or skip such steps with a gradient scaler"
            )
        return candidates[selection.highest(score, count).to(candidates.device)]

    return growth.Reading(grow, Need.GRADIENT)
