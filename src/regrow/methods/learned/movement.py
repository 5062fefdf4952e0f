"""Movement pruning."""

from __future__ import annotations

from regrow.core.checks import require_density
from regrow.methods.learned.latent import STRAIGHT
from regrow.methods.recipe import recipe
from regrow.parts import (
    MOVEMENT_SCORES,
    Allocation,
    Latent,
    Method,
    Trained,
    activate_highest,
    cubic,
    filled_with,
    gated,
    start_by,
    uniform,
)


@recipe
def movement(
    density: float,
    *,
    until: int,
    begin: int = 0,
    allocate: Allocation = uniform,
) -> Method:
    """Movement pruning: keep the weights that training moves away from zero.

    Each entry has a trained score s beside its value v; the entries of highest s are active. The gradient of s is
    v dL/dw at every position, that of v is dL/dw where active. After step t the density is
    density + (1 - density) (1 - (t - begin) / (until - begin))^3.

    Args:
        density: final active share of the sparsified entries, in (0, 1].
        until: optimizer step at which the ramp ends.
        begin: optimizer step at which the ramp begins.
        allocate: how the active entries are shared among the weights: `uniform` as in the paper, or `globally`.

    Source: Sanh et al. 2020, Movement Pruning: Adaptive Sparsity by Fine-Tuning, section 4 (hard, top-v). Scores begin
    at 0 and have no weight decay, as in the code. They have the weights' learning rate: a factor of it changes no
    ranking. Made for fine-tuning: begin with a trained model.

    Examples:
        >>> movement(0.1, until=1000).latent.trained[0].name
        'scores'
    """
    require_density("movement", density)
    update = activate_highest(cubic(1.0, density, until, begin), MOVEMENT_SCORES.flat, allocate, last=density)
    latent = Latent(gated, trained=(Trained(MOVEMENT_SCORES.key, filled_with(0.0), weight_decay=0.0),))
    return Method("movement", start_by(update), update, timing="after", needs=STRAIGHT, latent=latent)
