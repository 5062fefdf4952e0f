"""AC/DC."""

from __future__ import annotations

from regrow.core.checks import require_timing
from regrow.methods.gradual.ramp import require_target
from regrow.methods.recipe import recipe
from regrow.parts import (
    Allocation,
    Method,
    Need,
    Rule,
    Timing,
    Units,
    Weights,
    chain,
    constant,
    dense,
    every,
    globally,
    magnitude,
    prune,
    rewire,
)


@recipe
def ac_dc(
    density: float,
    *,
    until: int,
    begin: int | None = None,
    phase: int | None = None,
    allocate: Allocation = globally,
    timing: Timing = "after",
    structure: Units | None = None,
) -> Method:
    """AC/DC: alternate sparse and dense phases, from dense to sparse.

    Training is dense until `begin`. Then sparse and dense phases take turns. A sparse phase begins by pruning the
    smallest magnitudes; a dense one begins by making every entry active again, at zero. The phase before `until` is
    dense, and longer than the others if it must be. From `until` on the network stays sparse.

    Args:
        density: active share of the sparsified entries in sparse phases, in (0, 1].
        until: optimizer step at which the last sparse phase begins; the paper takes 85 of 100 epochs.
        begin: optimizer step at which the first sparse phase begins; None means two phases.
        phase: optimizer steps of a phase; None means a 17th of `until`: the paper's 5 of 85 epochs.
        allocate: `globally` for one threshold over all weights, as in the paper; `uniform`, `erk`.

    Source: Peste et al. 2021, AC/DC: Alternating Compressed/DeCompressed Training of Deep Neural Networks, Algorithm 1
    and section 4. Entries that come back start with zero optimizer state, the others keep theirs; the paper's runs
    reset the momentum of all.

    Examples:
        >>> method = ac_dc(0.1, until=85)
        >>> [step for step in range(100) if method.due(step)]
        [10, 15, 20, 25, 30, 35, 40, 45, 50, 55, 60, 65, 70, 75, 85]
    """
    require_target("ac_dc", density)
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
    return Method("ac_dc", dense(), update, timing=timing, needs=Need.DENSE_VALUES, units=structure)


def _activate_all(weights: Weights, step: int) -> None:
    rewire(weights, [weight.topology.at(None) for weight in weights])
