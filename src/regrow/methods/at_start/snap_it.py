"""SNAP-it."""

from __future__ import annotations

from regrow.methods.recipe import recipe
from regrow.parts import Method, outputs_in_rounds


@recipe
def snap_it(density: float, *, rounds: int = 5, prune_last: bool = False) -> Method:
    """SNAP-it: whole neurons or filters in rounds, by the sensitivity of a gate on each output.

    In round k of n the outputs of highest |sum of w g over their entries| are kept, wherever they are. Their number is
    the one whose entries come nearest to density^(k / n), the smaller of two that are equally near. So the density is
    met to half an output, or exceeded where each weight's best output, which always stays, asks for more. The blocks of
    packed weights (gates, projections) have outputs of their own.

    Args:
        density: active share of the sparsified entries, in (0, 1], to the nearest whole output.
        prune_last: whether outputs of the last parameter in module order, most often the classes, may go too; if not
            it stays dense, and the others make up for it.

    Raises:
        ValueError: from `regrow.sparsify`, without `batches` and `loss`, or where one output of each weight and all of
            the last one are more than the density says.

    Source: Verdenius et al. 2020, Pruning via Iterative Ranking of Sensitivity Statistics, section 3, where a gate lies
    on every node but the classes. Here it lies on what the weight's entries add to the output, so that a bias has no
    part in it. Inputs of the network are not pruned, and the entries that read a removed output stay active in the
    next layer, where they see a constant. The schedule is that of `snip_it`.

    Examples:
        >>> snap_it(0.3, rounds=3).start.needs_batches
        True
    """
    return Method("snap_it", outputs_in_rounds("snap_it", density, rounds, prune_last))
