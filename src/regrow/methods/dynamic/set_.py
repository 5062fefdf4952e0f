"""SET."""

from __future__ import annotations

from regrow.methods.dynamic.composition import dynamic_method
from regrow.methods.recipe import preset
from regrow.parts import at_random, constant, er, smallest


@preset(
    dynamic_method,
    drop=smallest,
    grow=at_random,
    interval=100,
    fraction=0.3,
    anneal=constant,
    allocate=er,
    timing="after",
)
def set_() -> None:
    """SET: drop the smallest magnitudes, grow at random.

    Source: Mocanu et al. 2018, Scalable training of artificial neural networks with adaptive sparse connectivity
    inspired by network science, Algorithm 1, which rewires once an epoch. Plain magnitude is the default drop, since
    SET's and SNFS's authors found it the better one; `lowest_per_sign` is that of the original code. Counts are exact,
    where the code of SET's successors draws every entry by itself.

    Examples:
        >>> set_(0.1, until=350).timing
        'after'
    """
