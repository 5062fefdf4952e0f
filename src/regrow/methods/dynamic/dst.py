"""Dynamic sparse training with parts of one's own choice."""

from __future__ import annotations

from regrow.methods.dynamic.composition import dynamic_method
from regrow.methods.recipe import preset


@preset(dynamic_method)
def dst() -> None:
    """Dynamic sparse training with any drop, any growth and any redistribution.

    Source: Liu et al. 2021, Sparse Training via Boosting Pruning Plasticity with Neuroregeneration, the code's method
    "DST", which ignores its options on small data sets. The parts have sources of their own.

    Examples:
        >>> from regrow.parts import at_random, mean_momentum
        >>> dst(0.1, until=350, grow=at_random, redistribute=mean_momentum).needs
        <Need.EVERY_GRADIENT|ROOM: 18>
    """
