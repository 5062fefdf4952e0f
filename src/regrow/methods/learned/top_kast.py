"""Top-KAST."""

from __future__ import annotations

from torch import Tensor

from regrow.core.checks import require_density
from regrow.methods.learned.latent import STRAIGHT
from regrow.methods.recipe import recipe
from regrow.parts import (
    BACKWARD_SET,
    LATENT,
    Allocation,
    Latent,
    Method,
    Parts,
    Rule,
    Weights,
    highest_positions,
    latent_magnitude,
    ranked_counts,
    start_by,
    straight_through,
    uniform,
)


@recipe
def top_kast(
    density: float,
    *,
    backward_density: float,
    penalty: float = 1e-4,
    interval: int = 1,
    allocate: Allocation = uniform,
) -> Method:
    """Top-KAST: use the largest magnitudes, train these and the next largest.

    A is the share `density` of largest magnitudes, which the model uses. B, the share `backward_density`, contains A;
    gradients reach B alone. The penalty on a latent value v is |v| in A, |v| / density in the rest of B, else 0.

    Args:
        density: active share of the sparsified entries (the paper's D), in (0, 1].
        backward_density: share of them that gradients reach (the paper's D + M), from `density` to 1.
        penalty: weight of the exploration penalty, at least 0.
        interval: optimizer steps between two choices of A and B.
        allocate: how A and B are shared among the weights: `uniform` as in the paper, `erk` or `globally`.

    Source: Jayakumar et al. 2020, Top-KAST: Top-K Always Sparse Training, sections 2.1 to 2.3. |v| of the penalty is
    read as the absolute value. Where rounding would give B fewer entries of a weight than A, it gets those of A. Values
    outside B have no gradient, but momentum and weight decay are the optimizer's: give it no weight decay to leave them
    at rest, as in the paper.

    Examples:
        >>> [step for step in range(1, 10) if top_kast(0.1, backward_density=0.2, interval=4).due(step)]
        [4, 8]
    """
    require_density("top_kast", density)
    if not density <= backward_density <= 1:
        raise ValueError(
            f"top_kast: backward_density must lie from the density, {density:g}, to 1, got {backward_density:g}: "
            "gradients must reach what the model uses"
        )
    if not penalty >= 0:
        raise ValueError(f"top_kast: penalty must be at least 0, got {penalty:g}")
    if interval < 1:
        raise ValueError(f"top_kast: choices must be at least 1 step apart, got interval {interval}")

    def apply(weights: Weights, step: int) -> None:
        scores = [latent_magnitude(w) for w in weights]
        used, trained = (ranked_counts(weights, scores, share, allocate) for share in (density, backward_density))
        sets = [
            (highest_positions(w, s, a), highest_positions(w, s, max(a, b)))
            for w, s, a, b in zip(weights, scores, used, trained, strict=True)
        ]
        for weight, (forward, backward) in zip(weights, sets, strict=True):
            BACKWARD_SET.set(weight, backward.mask.to(LATENT.of(weight).device))
            weight.rewire(forward)

    def exploration(parts: Parts, step: int) -> Tensor:
        magnitudes = parts.latent.abs()
        rest = BACKWARD_SET.of(parts) & ~parts.active
        return penalty * ((magnitudes * parts.active).sum() + (magnitudes * rest).sum() / density)

    update = (Rule(apply, lambda step: step % interval == 0, require=lambda weights: weights.require(density)),)
    latent = Latent(straight_through, penalty=exploration, reach=BACKWARD_SET.of)
    return Method("top_kast", start_by(update), update, timing="after", needs=STRAIGHT, latent=latent)
