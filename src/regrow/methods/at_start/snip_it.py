"""SNIP-it."""

from __future__ import annotations

from regrow.methods.recipe import recipe
from regrow.parts import Allocation, Method, Units, connection_sensitivity, globally, in_rounds, remaining


@recipe
def snip_it(
    density: float | None, *, rounds: int = 5, allocate: Allocation = globally, structure: Units | None = None
) -> Method:
    """SNIP-it: SNIP in rounds; each round judges the network that the round before has left.

    In round k of n the entries of highest |w g| among the active ones are kept, down to density^(k / n), with g the
    mean gradient over `batches` of the network pruned so far. What is pruned stays pruned.

    Args:
        density: active share of the sparsified entries, in (0, 1]; None, with rounds=1, leaves it to an explicit
            allocation.
        rounds: how often the gradient is asked for; 1 is `snip`.
        allocate: `globally` as in the paper; `uniform` or `erk` rank within each weight. It is asked in every round.

    Raises:
        ValueError: from `regrow.sparsify`, without `batches` and `loss`.

    Source: Verdenius et al. 2020, Pruning via Iterative Ranking of Sensitivity Statistics, section 3, whose code prunes
    half at first and then halves what is left to prune, in 5 steps; the exponential schedule is that of de Jorge et al.
    2021, Progressive Skeletonization, section 4 ("Iterative SNIP"). Every round reads all `batches`, and no training
    happens between rounds.

    Examples:
        >>> snip_it(0.1).start.needs_batches
        True
    """
    return Method(
        "snip_it", in_rounds("snip_it", density, rounds, connection_sensitivity, remaining, allocate), units=structure
    )
