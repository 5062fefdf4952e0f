"""Fixed fan-in shared by groups of outputs, as for very large output layers."""

from __future__ import annotations

from regrow.methods.dynamic.composition import dynamic_method
from regrow.methods.recipe import recipe
from regrow.parts import (
    Allocation,
    Anneal,
    Drop,
    Method,
    Regrow,
    Timing,
    Units,
    at_random_where_lost,
    constant,
    groups,
    random_fan_in,
    smallest,
    uniform,
)

GROUPS = groups(32)


@recipe
def haste(
    density: float | None,
    *,
    until: int,
    begin: int | None = None,
    interval: int = 1000,
    fraction: float = 0.15,
    anneal: Anneal = constant,
    drop: Drop = smallest,
    allocate: Allocation = uniform,
    regrow_dropped: Regrow = "reset",
    timing: Timing = "after",
    structure: Units | None = GROUPS,
) -> Method:
    """Group-shared fixed fan-in: groups of outputs share their inputs, lose the weakest and get random ones instead.

    A weight drops the groups' inputs of smallest mean magnitude, wherever they are, and each group of outputs grows as
    many random inputs as it lost, so that all fan-ins stay. A group of 1 is the fixed fan-in of single outputs.

    Args:
        fraction: share of active units dropped at an update, in [0, 1].
        regrow_dropped: "keep" or "reset" what is dropped and grows again at once; it cannot be forbidden.
        structure: the groups of outputs that share inputs, of 16, 32 or 64 in the published code.

    Source: HASTE, Group-shared Fixed Fan-in for large output spaces (ICML 2026), its published code, which updates for
    two thirds of the run; Schultheis and Babbar 2023 and SPARTEX (NeurIPS 2024) for single outputs. Inputs are drawn
    without repetition, where the code may draw one twice. Labels are not put in order, and there is no auxiliary
    objective.

    Examples:
        >>> method = haste(0.1, until=3000)
        >>> [step for step in range(4000) if method.due(step)]
        [1000, 2000]
    """
    if regrow_dropped == "forbid":
        raise ValueError(
            "haste: every group of outputs gets back what it lost, and regrow_dropped='forbid' may leave it no room: "
            "give 'keep' or 'reset'"
        )
    method = dynamic_method(
        "haste",
        density,
        until=until,
        begin=begin,
        interval=interval,
        fraction=fraction,
        anneal=anneal,
        drop=drop,
        grow=at_random_where_lost,
        allocate=allocate,
        regrow_dropped=regrow_dropped,
        timing=timing,
        structure=structure,
    )
    return method._replace(start=random_fan_in(density, allocate))
