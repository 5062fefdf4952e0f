"""Soft movement pruning."""

from __future__ import annotations

from regrow.methods.learned.latent import STRAIGHT, require_penalty, require_rate
from regrow.methods.recipe import recipe
from regrow.parts import MOVEMENT_SCORES, Latent, Method, Trained, activate_where, cubic, filled_with, gated, start_by


@recipe
def soft_movement(
    *,
    until: int,
    begin: int = 0,
    threshold: float = 0.1,
    penalty: float = 1e-5,
    score_lr: float | None = 1e-2,
) -> Method:
    """Soft movement pruning: movement pruning with one threshold for all scores, and a penalty instead of a density.

    An entry is active when sigmoid(s) > threshold. The loss gets penalty(t) times the sum of sigmoid(s) over all
    entries, with penalty(t) = penalty (1 - (1 - (t - begin) / (until - begin))^3).

    Args:
        until: optimizer step at which the penalty has its full weight.
        begin: optimizer step at which it begins to act.
        threshold: of sigmoid(s) (the paper's tau), in (0, 1).
        penalty: weight of the penalty (the paper's lambda_mvp), at least 0; what is active is an outcome of it.
        score_lr: learning rate of the scores; without it that of the weights.

    Source: Sanh et al. 2020, Movement Pruning, section 4 (soft). The sum is over entries, as printed; the code takes a
    mean over each matrix. A weight may lose all of its entries, where the code keeps at least 0.5 %.

    Examples:
        >>> soft_movement(until=1000).name
        'soft_movement'
    """
    if not 0 < threshold < 1:
        raise ValueError(
            f"soft_movement: threshold must lie in (0, 1), got {threshold:g}: sigmoid(s) is compared with it"
        )
    require_penalty("soft_movement", penalty)
    require_rate("soft_movement", "score_lr", score_lr)
    ramp = cubic(0.0, penalty, until, begin)
    update = activate_where(lambda weight: MOVEMENT_SCORES.flat(weight).sigmoid() > threshold)
    latent = Latent(
        gated,
        trained=(Trained(MOVEMENT_SCORES.key, filled_with(0.0), score_lr, 0.0),),
        penalty=lambda parts, step: ramp(step) * MOVEMENT_SCORES.of(parts).sigmoid().sum(),
    )
    return Method("soft_movement", start_by(update), update, timing="after", needs=STRAIGHT, latent=latent)
