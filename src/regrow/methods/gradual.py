"""Methods whose density follows a plan while entries move: gradual pruning with regeneration, and its relatives."""

from __future__ import annotations

from typing import NamedTuple

from regrow.core.checks import require_choice, require_density, require_fraction, require_timing
from regrow.core.method import Allocation, Method, Need, Regrow, Rule, Timing, Update
from regrow.core.topology import Topology
from regrow.core.weight import Weights
from regrow.methods.dynamic import Anneal, smallest
from regrow.parts import growth, starts
from regrow.parts.allocation import erk, globally, last_at_least, require_last, uniform
from regrow.parts.schedules import Schedule, constant, cosine_to, cubic
from regrow.parts.scores import magnitude
from regrow.parts.updates import chain, drop_and_grow, every, prune, rewire

cosine_to_half_percent: Anneal = cosine_to(0.005)
"""A cosine that ends at 0.005, as in the codes of SNFS, ITOP and GraNet."""


def granet(  # noqa: PLR0913 - two schedules, each with its own span
    density: float,
    *,
    until: int,
    prune_until: int | None = None,
    init_density: float = 0.5,
    begin: int = 0,
    interval: int = 1000,
    fraction: float = 0.5,
    anneal: Anneal = cosine_to_half_percent,
    init_allocate: Allocation = erk,
    allocate: Allocation = globally,
    last_density: float | None = None,
    last_layer: str | None = None,
    regrow_dropped: Regrow = "keep",
    timing: Timing = "after",
) -> Method:
    """GraNet: prune along a cubic ramp, and at each update also exchange weak entries for promising ones.

    d(t) = density + (init_density - density) (1 - (t - begin) / (prune_until - begin))^3. At each update, first the
    smallest magnitudes are pruned down to d(t); then every weight drops a fraction of what is left and grows as many
    entries where the gradient is largest (zero-cost neuroregeneration). Where no update falls on `prune_until`, the
    ramp ends there all the same, by pruning alone.

    Args:
        density: final active share of the sparsified entries, in (0, 1].
        until: optimizer step from which the topology is fixed; the paper regenerates to the end of the run.
        prune_until: optimizer step at which the ramp ends; None means half of `until`, as in the paper.
        init_density: active share at the start, from `density` to 1; 1 starts dense.
        begin: optimizer step at which ramp and regeneration begin.
        interval: optimizer steps between two updates.
        fraction: share of active entries exchanged at first, in [0, 1]; 0 leaves gradual pruning.
        anneal: how that share moves: `cosine_to(0.005)`, `cosine`, `constant`, `linear`, `inverse_power`.
        init_allocate: how a start below density 1 shares its entries among the weights.
        allocate: how pruning shares them: `globally` for one threshold over all weights, `uniform`, `erk`.
        last_density: the least density of the last layer, from the start on; None lets it fall like the others.
        last_layer: glob of that layer's name; None is the last of the weights.
        regrow_dropped: "keep", "reset" or "forbid" entries that are dropped and would grow again at once.
        timing: the update comes "after" an optimizer step, as in the paper's code, or "instead" of one.

    Source: Liu et al. 2021, Sparse Training via Boosting Pruning Plasticity with Neuroregeneration, section 4. The ramp
    is reached exactly (in the code a gap stays), and counts are rounded down to exact integers. No update at the last
    step. With a `begin` the anneal spans begin to `until`, in the code the whole run.

    Examples:
        >>> method = granet(0.1, until=5000)
        >>> [step for step in range(5001) if method.due(step)]
        [1000, 2000, 2500, 3000, 4000]
    """
    ramp = _ramp("granet", density, init_density, begin, interval, prune_until, until)
    last = _last("granet", last_density, last_layer)
    exchange = _exchange("granet", anneal, fraction, until, begin, regrow_dropped)
    return _granet(
        "granet", init_density, ramp, exchange, last, allocate, init_allocate, begin, interval, until, timing
    )


def granet_uniform(  # noqa: PLR0913 - two schedules, each with its own span
    density: float,
    *,
    until: int,
    prune_until: int | None = None,
    init_density: float = 0.5,
    begin: int = 0,
    interval: int = 1000,
    fraction: float = 0.5,
    anneal: Anneal = cosine_to_half_percent,
    init_allocate: Allocation = erk,
    last_density: float | None = 0.2,
    last_layer: str | None = None,
    regrow_dropped: Regrow = "keep",
    timing: Timing = "after",
) -> Method:
    """GraNet with the same density in every layer, except that the last one is not pruned below a fifth.

    As `granet` with `allocate=uniform`. With a start below density 1 a layer cannot gain what it does not hold: what
    is missing there stays in the others, so that the total follows the ramp exactly.

    Args:
        density: final active share of the sparsified entries, in (0, 1].
        until: optimizer step from which the topology is fixed; the paper regenerates to the end of the run.
        prune_until: optimizer step at which the ramp ends; None means half of `until`, as in the paper.
        init_density: active share at the start, from `density` to 1; 1 starts dense.
        begin: optimizer step at which ramp and regeneration begin.
        interval: optimizer steps between two updates.
        fraction: share of active entries exchanged at first, in [0, 1]; 0 leaves gradual pruning.
        anneal: how that share moves: `cosine_to(0.005)`, `cosine`, `constant`, `linear`, `inverse_power`.
        init_allocate: how a start below density 1 shares its entries among the weights.
        last_density: the least density of the last layer, from the start on; None lets it fall like the others.
        last_layer: glob of that layer's name; None is the last of the weights.
        regrow_dropped: "keep", "reset" or "forbid" entries that are dropped and would grow again at once.
        timing: the update comes "after" an optimizer step, as in the paper's code, or "instead" of one.

    Source: Liu et al. 2021, Sparse Training via Boosting Pruning Plasticity with Neuroregeneration, its code's variant
    "GraNet_uniform", with the rule for the last layer of Gale et al. 2019, section 5.2. In the code the last layer is
    one whose name contains "classifier".

    Examples:
        >>> granet_uniform(0.1, until=5000, init_density=1.0).needs
        <Need.GRADIENT|DENSE_VALUES: 9>
    """
    ramp = _ramp("granet_uniform", density, init_density, begin, interval, prune_until, until)
    last = _last("granet_uniform", last_density, last_layer)
    exchange = _exchange("granet_uniform", anneal, fraction, until, begin, regrow_dropped)
    return _granet(
        "granet_uniform", init_density, ramp, exchange, last, uniform, init_allocate, begin, interval, until, timing
    )


def gmp_uniform(
    density: float,
    *,
    until: int,
    begin: int = 0,
    interval: int = 1000,
    last_density: float | None = 0.2,
    last_layer: str | None = None,
    timing: Timing = "after",
) -> Method:
    """Gradual magnitude pruning with the same density in every layer, except that the last keeps at least a fifth.

    Args:
        density: final active share of the sparsified entries, in (0, 1].
        until: optimizer step at which the ramp ends.
        begin: optimizer step at which the ramp begins.
        interval: optimizer steps between two prunings.
        last_density: the least density of the last layer; None lets it fall like the others.
        last_layer: glob of that layer's name; None is the last of the weights.
        timing: prune "after" the optimizer step or "instead" of it.

    Source: Gale et al. 2019, The State of Sparsity in Deep Neural Networks, section 5.2; ramp of Zhu and Gupta 2017,
    To prune, or not to prune, section 3. Gale et al. also leave the first convolution dense: `skip=` does that.

    Examples:
        >>> method = gmp_uniform(0.1, until=2500)
        >>> [step for step in range(3000) if method.due(step)]
        [1000, 2000, 2500]
    """
    _require_target("gmp_uniform", density)
    require_timing("gmp_uniform", timing)
    ramp = cubic(1.0, density, until, begin)
    pruning = _pruning(ramp, uniform, _last("gmp_uniform", last_density, last_layer))
    update = every(interval, pruning, begin=begin or None, until=until)
    return Method("gmp_uniform", starts.dense(), update, timing=timing, needs=Need.DENSE_VALUES)


def ac_dc(
    density: float,
    *,
    until: int,
    begin: int | None = None,
    phase: int | None = None,
    allocate: Allocation = globally,
    timing: Timing = "after",
) -> Method:
    """AC/DC: alternate sparse and dense phases, from dense to sparse.

    Training is dense until `begin`. Then sparse phases, at whose start the smallest magnitudes are pruned, and dense
    phases, at whose start every entry becomes active again, at zero, take turns. The phase before `until` is dense,
    if need be a longer one; from `until` on the network stays sparse.

    Args:
        density: active share of the sparsified entries in sparse phases, in (0, 1].
        until: optimizer step at which the last sparse phase begins; the paper takes 85 of 100 epochs.
        begin: optimizer step at which the first sparse phase begins; None means two phases.
        phase: optimizer steps of a phase; None means a 17th of `until`: the paper's 5 of 85 epochs.
        allocate: `globally` for one threshold over all weights, as in the paper; `uniform`, `erk`.
        timing: the change comes "after" an optimizer step, or "instead" of one.

    Source: Peste et al. 2021, AC/DC: Alternating Compressed/DeCompressed Training of Deep Neural Networks, Algorithm 1
    and section 4. Entries that come back start with zero optimizer state, the others keep theirs; the paper's runs
    reset the momentum of all.

    Examples:
        >>> method = ac_dc(0.1, until=85)
        >>> [step for step in range(100) if method.due(step)]
        [10, 15, 20, 25, 30, 35, 40, 45, 50, 55, 60, 65, 70, 75, 85]
    """
    _require_target("ac_dc", density)
    require_timing("ac_dc", timing)
    length = max(1, until // 17) if phase is None else phase
    first = 2 * length if begin is None else begin
    if length < 1 or first < 1 or until <= first + length:
        raise ValueError(
            f"ac_dc: a sparse phase from begin ({first}) and a dense one, of phase ({length}) steps each, must fit "
            f"before until ({until}), with begin and phase at least 1: lower phase or begin, or raise until"
        )
    sparse = prune(constant(density, until), magnitude, allocate)
    update = chain(
        every(2 * length, sparse, begin=first, until=until - length),
        every(2 * length, (Rule(_activate_all),), begin=first + length, until=until),
    )
    return Method("ac_dc", starts.dense(), update, timing=timing, needs=Need.DENSE_VALUES)


def _require_target(name: str, density: float | None) -> None:
    if density is None:
        raise ValueError(f"{name}: give a density, which the allocation only shares out")
    require_density(name, density)


def _activate_all(weights: Weights, step: int) -> None:
    rewire(weights, [Topology(weight.shape) for weight in weights])


class _Last(NamedTuple):
    """The layer that keeps a least density."""

    density: float
    layer: str | None

    def of(self, allocate: Allocation) -> Allocation:
        """`allocate` with that layer's least density."""
        return last_at_least(self.density, self.layer, allocate)


def _last(name: str, density: float | None, layer: str | None) -> _Last | None:
    if density is None and layer is not None:
        raise ValueError(
            f"{name}: last_layer ({layer!r}) says where last_density holds, and that is None: give a density, or "
            "leave last_layer out"
        )
    if density is not None and not 0 <= density <= 1:
        raise ValueError(f"{name}: last_density must lie in [0, 1], got {density:g}")
    return None if density is None else _Last(density, layer)


def _ramp(
    name: str, density: float, init_density: float, begin: int, interval: int, prune_until: int | None, until: int
) -> Schedule:
    _require_target(name, density)
    if not density <= init_density <= 1:
        raise ValueError(
            f"{name}: init_density must lie between density ({density:g}) and 1, got {init_density:g}: pruning only "
            "lowers the density"
        )
    end, first = until // 2 if prune_until is None else prune_until, begin or interval
    if end > until:
        raise ValueError(f"{name}: prune_until ({end}) must not lie after until ({until})")
    if end <= first and interval > 0 and begin >= 0:
        half = ", half of until where it is not given" if prune_until is None else ""
        raise ValueError(
            f"{name}: the ramp must end after the first update, at step {first}, and prune_until is {end}{half}: raise "
            "until or prune_until, or lower begin or interval"
        )
    return cubic(init_density, density, end, begin)


def _exchange(name: str, anneal: Anneal, fraction: float, until: int, begin: int, regrow_dropped: Regrow) -> Update:
    """Zero-cost regeneration: drop the smallest magnitudes of every weight, grow as many by the gradient."""
    require_fraction(name, fraction)
    require_choice(name, "regrow_dropped", regrow_dropped, ("keep", "reset", "forbid"))
    schedule = anneal(fraction, until, begin)
    return drop_and_grow(schedule, smallest, growth.by_gradient, regrow_dropped=regrow_dropped)


def _pruning(ramp: Schedule, allocate: Allocation, last: _Last | None) -> Update:
    """Prune along the ramp; a least density of a layer is refused at once where the final total does not hold it."""
    if last is None:
        return prune(ramp, magnitude, allocate)

    def require(weights: Weights) -> None:
        require_last(last.density, last.layer, weights, weights.total(ramp(ramp.until or 0)))

    return chain(prune(ramp, magnitude, last.of(allocate)), (Rule(_nothing, lambda step: False, require=require),))


def _nothing(weights: Weights, step: int) -> None:
    pass


def _granet(
    name: str,
    init_density: float,
    ramp: Schedule,
    exchange: Update,
    last: _Last | None,
    allocate: Allocation,
    init_allocate: Allocation,
    begin: int,
    interval: int,
    until: int,
    timing: Timing,
) -> Method:
    require_timing(name, timing)
    first = begin or None
    update = chain(
        every(interval, _pruning(ramp, allocate, last), begin=first, until=ramp.until or until),
        every(interval, exchange, begin=first, until=until),
    )
    start = starts.dense()
    if init_density < 1:
        start = starts.random_topology(init_density, init_allocate if last is None else last.of(init_allocate))
    needs = Need.GRADIENT | (Need.DENSE_VALUES if init_density == 1 else Need.NOTHING)
    return Method(name, start, update, timing=timing, needs=needs)
