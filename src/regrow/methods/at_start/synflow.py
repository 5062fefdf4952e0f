"""SynFlow."""

from __future__ import annotations

from regrow.methods.recipe import recipe
from regrow.parts import Allocation, Method, Units, globally, in_rounds, remaining, synaptic_flow


@recipe
def synflow(
    density: float | None, *, rounds: int = 100, allocate: Allocation = globally, structure: Units | None = None
) -> Method:
    """SynFlow: keep the entries that most of the flow from inputs to outputs passes through; data plays no part.

    In round k of n the entries of highest |w| dR/d|w| are kept, down to density^(k / n), where R is the sum of the
    outputs for an input of ones, with absolute values of all parameters that are left. In a network without skips or
    biases every layer has the same sum of scores, so that with enough rounds none is emptied before the others are.

    `batches` give the shapes of the inputs, and `loss` says how the model is called: it is left at that call.

    Args:
        density: active share of the sparsified entries, in (0, 1]; None, with rounds=1, leaves it to an explicit
            allocation.
        rounds: how often the flow is asked for.
        allocate: `globally` as in the paper; `uniform` or `erk` rank within each weight. It is asked in every round.

    Raises:
        ValueError: from `regrow.sparsify`, without `batches` and `loss`, or for a model whose inputs are all integers.

    Source: Tanaka et al. 2020, Pruning neural networks without any data by iteratively conserving synaptic flow,
    Algorithm 1, with one example of ones, in evaluation mode and in double precision as in its code. The code takes
    absolute values of running means too; here buffers stay as they are.

    Examples:
        >>> synflow(0.01).start.needs_batches
        True
    """
    return Method("synflow", in_rounds("synflow", density, rounds, synaptic_flow, remaining, allocate), units=structure)
