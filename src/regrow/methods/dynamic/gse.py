"""GSE."""

from __future__ import annotations

import math

from regrow.core.checks import require_fraction
from regrow.methods.dynamic.composition import dynamic_method
from regrow.methods.recipe import recipe
from regrow.parts import (
    Allocation,
    Anneal,
    Drop,
    Method,
    Regrow,
    Statistic,
    Timing,
    Units,
    cosine,
    er,
    sampled_gradient,
    smallest,
)


@recipe
def gse(  # noqa: PLR0913 - every part of the update but the growth is an option
    density: float | None,
    *,
    until: int,
    begin: int | None = None,
    interval: int = 1000,
    fraction: float = 0.2,
    anneal: Anneal = cosine,
    gamma: float = 1.0,
    drop: Drop = smallest,
    redistribute: Statistic | None = None,
    decay: float | None = None,
    allocate: Allocation = er,
    regrow_dropped: Regrow = "forbid",
    timing: Timing = "after",
    structure: Units | None = None,
) -> Method:
    """GSE: drop the smallest magnitudes, grow where the gradient is largest in a random subset of the inactive entries.

    With compressed storage an update costs time and memory for (1 + gamma) nnz entries; no dense gradient is formed.

    Args:
        gamma: candidates per active entry, at least `fraction`.

    Source: Heddes et al. 2024, Always-Sparse Training by Growing Connections with Guided Stochastic Exploration,
    Algorithm 1 with uniform sampling, and 120 of 200 epochs for `until`. The published code compares all weights with
    each other by default, while each weight keeps its count here. Its gradient is that of extra batches, here that of
    the step's own. Candidates are drawn among the inactive entries alone and without repetition. The code reads a
    convolution as a matrix before it takes ER.

    Examples:
        >>> gse(0.1, until=3500).needs
        <Need.GRADIENT: 1>
    """
    require_fraction("gse", fraction)
    if not fraction <= gamma < math.inf:
        raise ValueError(
            f"gse: gamma {gamma:g} gives fewer candidates than the drop fraction {fraction:g} asks to grow: raise "
            "gamma or lower fraction"
        )
    return dynamic_method(
        "gse",
        density,
        until=until,
        begin=begin,
        interval=interval,
        fraction=fraction,
        anneal=anneal,
        drop=drop,
        grow=sampled_gradient(gamma),
        redistribute=redistribute,
        decay=decay,
        allocate=allocate,
        regrow_dropped=regrow_dropped,
        timing=timing,
        structure=structure,
    )
