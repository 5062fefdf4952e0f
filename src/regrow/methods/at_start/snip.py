"""SNIP."""

from __future__ import annotations

from regrow.core.checks import require_density
from regrow.methods.recipe import recipe
from regrow.parts import Allocation, Method, Units, by_score, globally, saliency


@recipe
def snip(density: float | None, *, allocate: Allocation = globally, structure: Units | None = None) -> Method:
    """SNIP: keep the entries whose removal would change the loss most, before training.

    The score |w g| is read from the gradient that the first optimizer step would have used, and takes that step's
    place; given `batches` and `loss`, `regrow.sparsify` reads it from their mean gradient at once.

    Args:
        allocate: `globally` as in the paper; `uniform` or `erk` rank within each weight, as RigL's code does.

    Source: Lee et al. 2019, SNIP, Algorithm 1. The gradient is that of the loss alone; RigL's code adds L2.

    Examples:
        >>> snip(0.1).start.needs_gradient
        True
    """
    require_density("snip", density)
    return Method("snip", by_score(density, saliency, allocate, needs_gradient=True), units=structure)
