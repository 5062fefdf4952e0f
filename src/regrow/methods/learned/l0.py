"""L0 regularization."""

from __future__ import annotations

import math

from regrow.methods.learned.latent import STRAIGHT, require_penalty, require_rate
from regrow.methods.recipe import recipe
from regrow.parts import (
    GATE_LOGITS,
    Latent,
    Method,
    Trained,
    activate_where,
    filled_with,
    hard_concrete,
    open_probability,
    start_by,
)


@recipe
def l0(
    *,
    penalty: float = 0.1 / 60_000,
    droprate: float = 0.5,
    temperature: float = 2 / 3,
    gate_lr: float | None = None,
) -> Method:
    """L0 regularization: every entry has a random gate that may be exactly zero, and open gates cost.

    A training forward sees v z, with z a stretched and clipped concrete draw around the trained log_alpha; the loss
    gets penalty times the expected number of open gates. Evaluation, `state_dict`, counts and exports see v times
    the gate without noise: what is active is where that is above zero, an outcome of the penalty.

    Args:
        penalty: cost of an open gate (the paper's lambda, already divided by the number of examples), at least 0.
        droprate: how probably a gate is closed at first, in (0, 1).
        temperature: of the concrete distribution (the paper's beta), above 0.
        gate_lr: learning rate of log_alpha; without it that of the weights.

    Source: Louizos et al. 2018, Learning Sparse Neural Networks through L0 Regularization, sections 2 and 4. There a
    gate stands for an input or a filter, here for one entry, as in Gale et al. 2019, The State of Sparsity. All
    forwards of an optimizer step share one draw. First log_alpha are equal, where the code adds a little noise, and
    they are not clipped. log_alpha has no weight decay; that of the weights is the optimizer's.

    Examples:
        >>> [t.name for t in l0().latent.trained]
        ['log_alpha']
    """
    require_penalty("l0", penalty)
    if not 0 < droprate < 1:
        raise ValueError(f"l0: droprate must lie in (0, 1), got {droprate:g}")
    if not temperature > 0:
        raise ValueError(f"l0: temperature must be above 0, got {temperature:g}")
    require_rate("l0", "gate_lr", gate_lr)
    update = activate_where(lambda weight: hard_concrete(GATE_LOGITS.flat(weight), None, temperature) > 0)
    latent = Latent(
        lambda parts: parts.latent * hard_concrete(GATE_LOGITS.of(parts), parts.noise, temperature),
        trained=(Trained(GATE_LOGITS.key, filled_with(math.log(1 - droprate) - math.log(droprate)), gate_lr, 0.0),),
        penalty=lambda parts, step: penalty * open_probability(GATE_LOGITS.of(parts), temperature).sum(),
        noise=lambda stream, count: stream.uniform(count),
    )
    return Method("l0", start_by(update), update, timing="after", needs=STRAIGHT, latent=latent)
