"""RigL."""

from __future__ import annotations

from regrow.methods.dynamic.composition import dynamic_method
from regrow.methods.recipe import preset
from regrow.parts import by_gradient, cosine, erk, smallest


@preset(
    dynamic_method,
    drop=smallest,
    grow=by_gradient,
    interval=100,
    fraction=0.3,
    anneal=cosine,
    allocate=erk,
    timing="instead",
)
def rigl() -> None:
    """RigL: drop the smallest magnitudes, grow where the gradient is largest.

    Source: Evci et al. 2020, Rigging the Lottery: Making All Tickets Winners, Algorithm 1, where the update comes
    instead of an optimizer step and `until` is three quarters of the run. No noise is added to the scores, inactive
    entries cannot survive the drop, and the first update is at `interval`, not at step 0.

    Examples:
        >>> method = rigl(0.1, until=350)
        >>> [step for step in range(500) if method.due(step)]
        [100, 200, 300]
    """
