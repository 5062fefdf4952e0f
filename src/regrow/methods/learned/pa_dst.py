"""PA-DST."""

from __future__ import annotations

from torch import Tensor

from regrow.core.checks import require_density
from regrow.methods.learned.latent import STRAIGHT, require_penalty, require_rate
from regrow.methods.recipe import recipe
from regrow.parts import (
    INPUT_ORDER,
    PATTERN,
    PERMUTATION,
    Allocation,
    Latent,
    Method,
    Parts,
    Probe,
    Rule,
    SparseWeight,
    Start,
    Structure,
    Topology,
    Trained,
    Weights,
    assignment,
    diagonals,
    latent_magnitude,
    make_doubly_stochastic,
    near_identity,
    permutation_distance,
    permuted,
    ranked_counts,
    rewire,
    uniform,
)


@recipe
def pa_dst(
    density: float | None,
    *,
    until: int,
    interval: int = 100,
    penalty: float = 1e-4,
    spread: float = 0.5,
    permutation_lr: float | None = None,
    allocate: Allocation = uniform,
    structure: Structure = diagonals,
) -> Method:
    """PA-DST: a structured sparse weight with a learned permutation of its inputs.

    A layer computes y = S P x. S holds the largest latent magnitudes in a structure, chosen anew every `interval`
    steps. P is trained as a matrix M: after each step its negative entries are cut off, and its columns and rows are
    divided by their sums. The loss gets penalty times the sum over rows and columns of ||.||_1 - ||.||_2. The weight
    S M is dense. At `until` M becomes the nearest permutation, S rests, and the active entries of S P train on.

    Args:
        density: active share of the sparsified entries from `until` on, in (0, 1], as the structure comes nearest.
        until: optimizer step at which permutation and structure are fixed.
        interval: optimizer steps between two choices of S.
        penalty: its weight in the loss (the paper's lambda), at least 0.
        spread: first M is (1 - spread) I + spread / inputs, in [0, 1].
        permutation_lr: learning rate of M; without it that of the weights.
        structure: `diagonals`, `n_of_m(2, 4)`, `groups(8)`, `blocks(h, w)`, `rows`, `columns`, or any other.

    Source: Tyagi et al. 2025, Efficient Dynamic Structured Sparse Training with Learned Shuffles (PA-DST), section 4.3,
    and its code; Lyu et al. 2020, AutoShuffleNet, for the penalty. The defaults of `interval`, `penalty` and `spread`
    are ours. S is chosen as in `sr_ste`, in the place of another dynamic method. The permutation is the one of
    largest sum, where the code rounds each row by itself. Blocks of a packed weight have permutations of their own.

    Examples:
        >>> pa_dst(0.1, until=300).latent.trained[0].name
        'permutation'
    """
    require_density("pa_dst", density)
    require_penalty("pa_dst", penalty)
    require_rate("pa_dst", "permutation_lr", permutation_lr)
    if until < 1 or interval < 1:
        raise ValueError(f"pa_dst: until and interval must be at least 1 step, got {until} and {interval}")
    if not 0 <= spread <= 1:
        raise ValueError(f"pa_dst: spread must lie in [0, 1], got {spread:g}")

    def choose(weights: Weights) -> None:
        scores = [latent_magnitude(w) for w in weights]
        counts = ranked_counts(weights, scores, density, allocate)
        patterns = [structure(w, s, n).mask for w, s, n in zip(weights, scores, counts, strict=True)]
        for weight, score, pattern in zip(weights, scores, patterns, strict=True):
            PATTERN.set(weight, pattern.to(score.device))

    def make(weights: Weights, probe: Probe) -> None:
        choose(weights)
        rewire(weights, [w.topology for w in weights])

    def apply(weights: Weights, step: int) -> None:
        for weight in weights:
            make_doubly_stochastic(PERMUTATION.of(weight))
        if step % interval == 0 or step == until:
            choose(weights)
        if step == until:
            for weight in weights:
                INPUT_ORDER.set(weight, _order(weight))
        rewire(weights, [_ordered(w) if step == until else w.topology for w in weights])

    def distance(parts: Parts, step: int) -> Tensor:
        if INPUT_ORDER.known(parts):
            return parts.latent.flatten()[:0].sum()
        return penalty * permutation_distance(PERMUTATION.of(parts))

    latent = Latent(
        permuted,
        trained=(Trained(PERMUTATION.key, near_identity(spread), permutation_lr, 0.0),),
        penalty=distance,
        reach=lambda parts: parts.active,
    )
    return Method(
        "pa_dst",
        Start(make, require=lambda weights: weights.require(density)),
        (Rule(apply, lambda step: step <= until),),
        timing="after",
        needs=STRAIGHT,
        latent=latent,
    )


def _order(weight: SparseWeight) -> Tensor:
    matrix = PERMUTATION.of(weight)
    try:
        return assignment(matrix).to(matrix.device)
    except ValueError as error:
        raise ValueError(f"{weight.name}: of its permutation {error}: training has diverged") from None


def _ordered(weight: SparseWeight) -> Topology:
    """The topology of the pattern, its inputs in their order."""
    mask = PATTERN.of(weight).index_select(weight.in_axis, INPUT_ORDER.of(weight)).reshape(-1)
    return Topology(weight.shape, None if bool(mask.all()) else mask.nonzero().view(-1))
