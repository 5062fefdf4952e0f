"""RigL in patterns n:m."""

from __future__ import annotations

from regrow.methods.dynamic.composition import dynamic_method
from regrow.methods.recipe import recipe
from regrow.parts import (
    Anneal,
    Drop,
    Method,
    Regrow,
    Timing,
    by_gradient_where_lost,
    cosine,
    n_of_m,
    random_topology,
    smallest,
    uniform,
)


@recipe
def rigl_nm(
    *,
    n: int = 2,
    m: int = 4,
    until: int,
    begin: int | None = None,
    interval: int = 100,
    fraction: float = 0.3,
    anneal: Anneal = cosine,
    drop: Drop = smallest,
    regrow_dropped: Regrow = "keep",
    timing: Timing = "instead",
) -> Method:
    """Dynamic n:m sparsity: RigL in groups of m consecutive inputs, each of which always has n active entries.

    A weight drops its smallest magnitudes, wherever they are, and each group grows as many entries as it lost, where
    its own gradient is largest. The density is n / m.

    Args:
        n: active entries of each group, in [1, m].
        m: inputs of a group.
        regrow_dropped: "keep" or "reset" what is dropped and grows again at once; it cannot be forbidden.

    Source: Evci et al. 2020, Rigging the Lottery, Algorithm 1, in the patterns of Mishra et al. 2021, section 3; the
    growth inside a group is that of pytorch/ao issue 3222 (2025), which drops what changes its sign. That form is
    `deep_r` with the same growth. The first topology is random.

    Examples:
        >>> method = rigl_nm(n=2, m=4, until=350)
        >>> [step for step in range(500) if method.due(step)]
        [100, 200, 300]
    """
    structure = n_of_m(n, m)
    if regrow_dropped == "forbid":
        raise ValueError(
            "rigl_nm: every group gets back what it lost, and regrow_dropped='forbid' may leave it no room: give "
            "'keep' or 'reset'"
        )
    method = dynamic_method(
        "rigl_nm",
        n / m,
        until=until,
        begin=begin,
        interval=interval,
        fraction=fraction,
        anneal=anneal,
        drop=drop,
        grow=by_gradient_where_lost(m),
        allocate=uniform,
        regrow_dropped=regrow_dropped,
        timing=timing,
    )
    return method._replace(start=random_topology(n / m, uniform, structure))
