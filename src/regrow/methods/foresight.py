"""Methods that choose the topology before training, from several looks at gradients; it never changes afterwards."""

from __future__ import annotations

from regrow.core.method import Allocation, Method
from regrow.parts.allocation import globally
from regrow.parts.rounds import (
    connection_sensitivity,
    every_position,
    gradient_flow,
    in_rounds,
    outputs_in_rounds,
    remaining,
    synaptic_flow,
)


def snip_it(density: float | None, *, rounds: int = 5, allocate: Allocation = globally) -> Method:
    """SNIP-it: SNIP in rounds, each of which judges the network that the round before has left.

    In round k of n the entries of highest |w g| among the active ones are kept, down to density^(k / n), with g the
    mean gradient over `batches` of the network pruned so far. What is pruned stays pruned.

    Args:
        density: active share of the sparsified entries, in (0, 1]; None, with rounds=1, leaves it to an explicit
            allocation.
        rounds: how often the gradient is asked for; 1 is `snip`.
        allocate: `globally` as in the paper; `uniform` or `erk` rank within each weight. It is asked in every round.

    Raises:
        ValueError: from `regrow.sparsify`, without `batches` and `loss`.

    Source: Verdenius et al. 2020, Pruning via Iterative Ranking of Sensitivity Statistics, section 3, whose code prunes
    half at first and then halves what is left to prune, in 5 steps; the exponential schedule is that of de Jorge et al.
    2021, Progressive Skeletonization, section 4 ("Iterative SNIP"). Every round reads all `batches`, and no training
    happens between rounds.

    Examples:
        >>> snip_it(0.1).start.needs_batches
        True
    """
    return Method("snip_it", in_rounds("snip_it", density, rounds, connection_sensitivity, remaining, allocate))


def snap_it(density: float, *, rounds: int = 5, prune_last: bool = False) -> Method:
    """SNAP-it: whole neurons or filters in rounds, by the sensitivity of a gate on each output.

    In round k of n the outputs of highest |sum of w g over their entries| are kept, wherever they are. So many stay
    that their entries come nearest to density^(k / n) (at equal distance the fewer), which is not exact: it is off by
    half an output at most, unless each weight's best output, which always stays, asks for more. The blocks of packed
    weights (gates, projections) have outputs of their own.

    Args:
        density: active share of the sparsified entries, in (0, 1], to the nearest whole output.
        rounds: how often the gradient is asked for.
        prune_last: whether outputs of the last parameter in module order, most often the classes, may go too; if not
            it stays dense, and the others make up for it.

    Raises:
        ValueError: from `regrow.sparsify`, without `batches` and `loss`, or where one output of each weight and all of
            the last one are more than the density says.

    Source: Verdenius et al. 2020, Pruning via Iterative Ranking of Sensitivity Statistics, section 3, where a gate lies
    on every node but the classes. Here it lies on what the weight's entries add to the output, so that a bias has no
    part in it; inputs of the network are not pruned; and the entries that a removed output fed stay active in the
    next layer, where they see a constant. The schedule is that of `snip_it`.

    Examples:
        >>> snap_it(0.3, rounds=3).start.needs_batches
        True
    """
    return Method("snap_it", outputs_in_rounds("snap_it", density, rounds, prune_last))


def grasp(density: float | None, *, allocate: Allocation = globally) -> Method:
    """GraSP: remove the entries whose removal reduces the norm of the gradient least, or raises it most.

    The score -w (H g) is that of the dense network, with g and H gradient and Hessian of the mean loss over `batches`;
    the largest are removed, in one round.

    Args:
        density: active share of the sparsified entries, in (0, 1]; None leaves it to an explicit allocation.
        allocate: `globally` as in the paper; `uniform` or `erk` rank within each weight.

    Raises:
        ValueError: from `regrow.sparsify`, without `batches` and `loss`.

    Source: Wang et al. 2020, Picking Winning Tickets Before Training by Preserving Gradient Flow, Algorithm 1. There
    is no temperature here, as nothing knows the logits: the code's 200 is written into the caller's `loss`, as
    cross_entropy(logits / 200, y). Nor is a sample of each class drawn: give `batches` that hold 10 or more of each.
    g is the mean over all of them before H is asked for, so their order does not matter. Counts are exact, and no
    layer is drawn anew.

    Examples:
        >>> grasp(0.1).start.needs_batches
        True
    """
    return Method("grasp", in_rounds("grasp", density, 1, gradient_flow, remaining, allocate))


def synflow(density: float | None, *, rounds: int = 100, allocate: Allocation = globally) -> Method:
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
    Algorithm 1, in evaluation mode and in double precision as in its code, which takes one example of ones and the
    absolute values of running means too.

    Examples:
        >>> synflow(0.01).start.needs_batches
        True
    """
    return Method("synflow", in_rounds("synflow", density, rounds, synaptic_flow, remaining, allocate))


def force(density: float | None, *, rounds: int = 20, allocate: Allocation = globally) -> Method:
    """FORCE: SNIP in rounds in which pruned entries may come back.

    In round k of n the density^(k / n) entries of highest |w g| are kept among all positions, with w their first values
    and g the mean gradient over `batches` of the network that the round before has left.

    Args:
        density: active share of the sparsified entries, in (0, 1]; None, with rounds=1, leaves it to an explicit
            allocation.
        rounds: how often the gradient is asked for; 1 is `snip`.
        allocate: `globally` as in the paper; `uniform` or `erk` rank within each weight. It is asked in every round.

    Raises:
        ValueError: from `regrow.sparsify`, without `batches` and `loss`.

    Source: de Jorge et al. 2021, Progressive Skeletonization: Trimming more fat from a network at initialization,
    Algorithm 1 with the exponential schedule of section 4. Every round reads all `batches`, in the code a new sample.

    Examples:
        >>> force(0.01).start.needs_batches
        True
    """
    return Method("force", in_rounds("force", density, rounds, connection_sensitivity, every_position, allocate))
