"""STE."""

from __future__ import annotations

from regrow.core.checks import require_density
from regrow.methods.learned.latent import by_magnitude
from regrow.methods.recipe import recipe
from regrow.parts import Allocation, Method, uniform


@recipe
def ste(density: float | None, *, ramp: int | None = None, allocate: Allocation = uniform) -> Method:
    """STE: magnitude pruning with straight-through gradients, at once or along a ramp from dense.

    As `dnw`; with a `ramp` of T steps the density after step t is density + (1 - density) (1 - t / T)^3.

    Args:
        density: final active share of the sparsified entries, in (0, 1]; None leaves it to an explicit allocation.
        ramp: optimizer steps over which the density falls from 1; without it the density holds from the start.
        allocate: how the active entries are shared among the weights: `uniform`, `erk` or `globally`.

    Source: Bengio et al. 2013, section 4 (straight-through); Lin et al. 2020, Dynamic Model Pruning with Feedback,
    Algorithm 1, whose masks change every 16 steps where here they change at each; the ramp of Zhu and Gupta 2017.

    Examples:
        >>> ste(0.1, ramp=1000).name
        'ste'
    """
    require_density("ste", density)
    if ramp is not None and ramp < 1:
        raise ValueError(f"ste: the ramp must take 1 step or more, got {ramp}: leave it out to begin sparse")
    if ramp is not None and density is None:
        raise ValueError(f"ste: a ramp of {ramp} steps needs a density to end at, and density is None")
    return by_magnitude("ste", density, allocate, ramp)
