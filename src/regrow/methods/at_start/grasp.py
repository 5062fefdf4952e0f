"""GraSP."""

from __future__ import annotations

from regrow.methods.recipe import recipe
from regrow.parts import Allocation, Method, Units, globally, gradient_flow, in_rounds, remaining


@recipe
def grasp(density: float | None, *, allocate: Allocation = globally, structure: Units | None = None) -> Method:
    """GraSP: remove the entries whose removal reduces the norm of the gradient least, or raises it most.

    The score -w (H g) is that of the dense network, with g and H gradient and Hessian of the mean loss over `batches`;
    the largest are removed, in one round.

    Args:
        allocate: `globally` as in the paper; `uniform` or `erk` rank within each weight.

    Raises:
        ValueError: from `regrow.sparsify`, without `batches` and `loss`.

    Source: Wang et al. 2020, Picking Winning Tickets Before Training by Preserving Gradient Flow, Algorithm 1. There is
    no temperature here, since the library does not know the logits: write the code's 200 into `loss`, as
    cross_entropy(logits / 200, y). The library draws no sample of each class either: give `batches` that hold 10 or
    more of each. g is the mean over all of them before H is asked for, so their order does not matter. Counts are
    exact, and no layer is drawn anew.

    Examples:
        >>> grasp(0.1).start.needs_batches
        True
    """
    return Method("grasp", in_rounds("grasp", density, 1, gradient_flow, remaining, allocate), units=structure)
