"""Static sparse training."""

from __future__ import annotations

from regrow.core.checks import require_density
from regrow.methods.recipe import recipe
from regrow.parts import Allocation, Method, Units, erk, random_topology


@recipe
def static(density: float | None, *, allocate: Allocation = erk, structure: Units | None = None) -> Method:
    """A random topology that never changes.

    Source: Evci et al. 2020, Rigging the Lottery, section 4 ("Static").

    Examples:
        >>> static(0.1).name
        'static'
    """
    require_density("static", density)
    return Method("static", random_topology(density, allocate), units=structure)
