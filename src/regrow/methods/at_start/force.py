"""FORCE."""

from __future__ import annotations

from regrow.methods.recipe import recipe
from regrow.parts import Allocation, Method, Units, connection_sensitivity, every_position, globally, in_rounds


@recipe
def force(
    density: float | None, *, rounds: int = 20, allocate: Allocation = globally, structure: Units | None = None
) -> Method:
    """FORCE: SNIP in rounds in which pruned entries may come back.

    In round k of n the density^(k / n) entries of highest |w g| are kept among all positions, with w their first values
    and g the mean gradient over `batches` of the network that the round before has left.

    Args:
        density: active share of the sparsified entries, in (0, 1]; None, with rounds=1, leaves it to an explicit
            allocation.
        rounds: how often the gradient is asked for; 1 is `snip`.
        allocate: `globally` as in the paper; `uniform` or `erk` rank within each weight. It is asked in every round.

    Raises:
        ValueError: from `regrow.sparsify`, without `batches` and `loss`.

    Source: de Jorge et al. 2021, Progressive Skeletonization: Trimming more fat from a network at initialization,
    Algorithm 1 with the exponential schedule of section 4. Every round reads all `batches`; the
    code draws a new sample.

    Examples:
        >>> force(0.01).start.needs_batches
        True
    """
    return Method(
        "force", in_rounds("force", density, rounds, connection_sensitivity, every_position, allocate), units=structure
    )
