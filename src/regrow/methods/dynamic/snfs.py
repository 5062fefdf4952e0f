"""SNFS, sparse momentum."""

from __future__ import annotations

from regrow.methods.dynamic.composition import dynamic_method
from regrow.methods.recipe import preset
from regrow.parts import by_momentum, cosine, mean_momentum, smallest, uniform


@preset(
    dynamic_method,
    drop=smallest,
    grow=by_momentum,
    redistribute=mean_momentum,
    interval=100,
    fraction=0.5,
    anneal=cosine,
    allocate=uniform,
    timing="after",
)
def snfs() -> None:
    """SNFS (sparse momentum): grow where a running mean of gradients is largest, and move entries between weights.

    Source: Dettmers and Zettlemoyer 2019, Sparse Networks from Scratch, section 3, which updates once an epoch. New
    entries start with zero optimizer state, where the code lets them inherit the dense momentum. The code's brake on
    nearly dense layers and its correction of inexact counts are not needed. With decay=0 growth ranks the gradient of
    one batch.

    Examples:
        >>> snfs(0.1, until=350).needs
        <Need.EVERY_GRADIENT|ROOM: 18>
    """
