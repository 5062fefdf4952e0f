"""In-time over-parameterization: dynamic sparse training that is meant to visit many positions, and counts them."""

from __future__ import annotations

from regrow.methods.dynamic.composition import dynamic_method
from regrow.methods.recipe import preset
from regrow.parts import Need, at_random, by_gradient


@preset(dynamic_method, needs=Need.EXPLORED, grow=at_random, interval=1500, fraction=0.5)
def itop_set() -> None:
    """SET-ITOP: SET with long intervals and no early end, and a record of every position that was ever active.

    The interval is so long that new entries can show what they are worth, and `until` is the end of the run.

    Source: Liu et al. 2021, Do We Actually Need Dense Over-Parameterization? In-Time Over-Parameterization in Sparse
    Training, sections 3.2 and 4. No update falls on the last step, which would leave untrained entries behind. The drop
    fraction ends at 0, in the code at 0.005. Counts are exact, where the code draws every entry by itself.

    Examples:
        >>> from regrow.parts import unexplored_first
        >>> itop_set(0.1, until=5000, grow=unexplored_first).needs
        <Need.EXPLORED: 4>
    """


@preset(dynamic_method, needs=Need.EXPLORED, grow=by_gradient, interval=4000, fraction=0.5)
def itop_rigl() -> None:
    """RigL-ITOP: RigL with long intervals and no early end, and a record of every position that was ever active.

    The interval is so long that new entries can show what they are worth, and `until` is the end of the run.

    Source: Liu et al. 2021, Do We Actually Need Dense Over-Parameterization? In-Time Over-Parameterization in Sparse
    Training, sections 3.2 and 4. No update falls on the last step, which would leave untrained entries behind. The drop
    fraction ends at 0, in the code at 0.005.

    Examples:
        >>> itop_rigl(0.1, until=5000).needs
        <Need.GRADIENT|EXPLORED: 5>
    """
