"""GraNet: gradual pruning with neuroregeneration."""

from __future__ import annotations

from regrow.core.checks import require_fraction, require_timing
from regrow.methods.drop_grow import drop_grow
from regrow.methods.gradual.ramp import last_of, pruning, require_target
from regrow.methods.recipe import preset
from regrow.parts import (
    Allocation,
    Anneal,
    Drop,
    Growth,
    Method,
    Need,
    Regrow,
    Schedule,
    Statistic,
    Timing,
    Units,
    by_gradient,
    chain,
    cosine_to_half_percent,
    cubic,
    dense,
    erk,
    every,
    globally,
    random_topology,
    smallest,
    uniform,
)


def _granet(  # noqa: PLR0913 - two schedules, each with its own span
    name: str,
    density: float,
    *,
    until: int,
    prune_until: int | None = None,
    init_density: float = 0.5,
    begin: int = 0,
    interval: int = 1000,
    fraction: float = 0.5,
    anneal: Anneal = cosine_to_half_percent,
    drop: Drop = smallest,
    grow: Growth = by_gradient,
    redistribute: Statistic | None = None,
    decay: float | None = None,
    init_allocate: Allocation = erk,
    allocate: Allocation = globally,
    last_density: float | None = None,
    last_layer: str | None = None,
    regrow_dropped: Regrow = "keep",
    timing: Timing = "after",
    structure: Units | None = None,
) -> Method:
    ramp = _ramp(name, density, init_density, begin, interval, prune_until, until)
    last = last_of(name, last_density, last_layer)
    require_fraction(name, fraction)
    require_timing(name, timing)
    if last is not None and redistribute is not None:
        raise ValueError(
            f"{name}: last_density ({last.density:g}) holds the last layer, and redistribute would move its entries: "
            "leave redistribute out, or give last_density=None"
        )
    moves = drop_grow(name, anneal(fraction, until, begin), drop, grow, redistribute, decay, regrow_dropped)
    first = begin or None
    update = chain(
        every(interval, pruning(ramp, allocate, last), begin=first, until=ramp.until or until),
        every(interval, moves.update, begin=first, until=until),
    )
    start, needs = dense(), moves.needs | Need.DENSE_VALUES
    if init_density < 1:
        start = random_topology(init_density, init_allocate if last is None else last.of(init_allocate))
        needs = moves.needs
    return Method(name, start, update, observe=moves.observe, timing=timing, needs=needs, units=structure)


@preset(_granet)
def granet() -> None:
    """GraNet: prune along a cubic ramp, and at each update also exchange weak entries for promising ones.

    d(t) = density + (init_density - density) (1 - (t - begin) / (prune_until - begin))^3. At each update, first the
    smallest magnitudes are pruned down to d(t); then every weight drops a fraction of what is left and grows as many
    entries where the gradient is largest (zero-cost neuroregeneration). Where no update falls on `prune_until`, the
    ramp ends there all the same, by pruning alone.

    Args:
        density: final active share of the sparsified entries, in (0, 1].
        prune_until: optimizer step at which the ramp ends; None means half of `until`, as in the paper.
        init_density: active share at the start, from `density` to 1; 1 starts dense.
        begin: optimizer step at which ramp and regeneration begin.
        fraction: share of active entries exchanged at first, in [0, 1]; 0 leaves gradual pruning.
        init_allocate: how a start below density 1 shares its entries among the weights.
        allocate: how pruning shares them: `globally` for one threshold over all weights, `layer_adaptive`, `uniform`,
            `erk`.

    Source: Liu et al. 2021, Sparse Training via Boosting Pruning Plasticity with Neuroregeneration, section 4, which
    regenerates to the end of the run. The ramp is reached exactly (in the code a gap stays), and counts are rounded
    down to exact integers. No update falls on the last step. With a `begin` the anneal spans begin to `until`, in the
    code the whole run.

    Examples:
        >>> method = granet(0.1, until=5000)
        >>> [step for step in range(5001) if method.due(step)]
        [1000, 2000, 2500, 3000, 4000]
    """


@preset(_granet, allocate=uniform, last_density=0.2)
def granet_uniform() -> None:
    """GraNet with the same density in every layer, except that the last one is not pruned below a fifth.

    It is `granet` with other defaults for `allocate` and `last_density`. A layer that starts sparser
    than its share cannot gain entries; the others then keep more, so that the total follows the ramp exactly.

    Args:
        density: final active share of the sparsified entries, in (0, 1].
        prune_until: optimizer step at which the ramp ends; None means half of `until`, as in the paper.
        init_density: active share at the start, from `density` to 1; 1 starts dense.
        begin: optimizer step at which ramp and regeneration begin.
        fraction: share of active entries exchanged at first, in [0, 1]; 0 leaves gradual pruning.
        init_allocate: how a start below density 1 shares its entries among the weights.

    Source: Liu et al. 2021, Sparse Training via Boosting Pruning Plasticity with Neuroregeneration, its code's variant
    "GraNet_uniform", with the rule for the last layer of Gale et al. 2019, section 5.2. In the code the last layer is
    one whose name contains "classifier".

    Examples:
        >>> granet_uniform(0.1, until=5000, init_density=1.0).needs
        <Need.GRADIENT|DENSE_VALUES: 9>
    """


def _ramp(
    name: str, density: float, init_density: float, begin: int, interval: int, prune_until: int | None, until: int
) -> Schedule:
    require_target(name, density)
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
