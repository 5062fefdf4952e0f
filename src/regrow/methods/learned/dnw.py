"""DNW."""

from __future__ import annotations

from regrow.core.checks import require_density
from regrow.methods.learned.latent import by_magnitude
from regrow.methods.recipe import recipe
from regrow.parts import Allocation, Method, uniform


@recipe
def dnw(density: float | None, *, allocate: Allocation = uniform) -> Method:
    """DNW: train all weights straight through, use the largest magnitudes.

    After every optimizer step the active entries are the largest magnitudes among all positions. The gradient with
    respect to the sparse weight reaches every latent value, active or not, so that what was dropped may come back.

    Args:
        allocate: how the active entries are shared among the weights: `uniform` as in RigL's comparison, or `globally`.

    Source: Wortsman et al. 2019, Discovering Neural Wirings, Algorithm 1 and section 3.3; per-layer counts as in the
    code of Evci et al. 2020. The optimizer's weight decay acts on latent values at every position.

    Examples:
        >>> dnw(0.1).due(1)
        True
    """
    require_density("dnw", density)
    return by_magnitude("dnw", density, allocate, None)
