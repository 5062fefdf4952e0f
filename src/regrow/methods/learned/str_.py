"""STR."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from regrow.core.checks import require_choice
from regrow.methods.learned.latent import require_rate
from regrow.methods.recipe import recipe
from regrow.parts import (
    SOFT_THRESHOLD,
    Latent,
    Method,
    Need,
    SparseWeight,
    Trained,
    activate_where,
    latent_magnitude,
    one_number,
    soft_threshold,
    start_by,
)

Threshold = Literal["sigmoid", "exp"]
"""How a trained number becomes a threshold."""


@recipe
def str_(
    *,
    initial: float = -10.0,
    threshold: Threshold = "sigmoid",
    threshold_lr: float | None = None,
    threshold_weight_decay: float | None = None,
) -> Method:
    """STR: a soft threshold for each weight, learned with the values.

    w = sign(v) max(|v| - g(s), 0) with one trained number s per weight. What is active, |v| > g(s), is an outcome: a
    larger weight decay, of s too, makes it less.

    Args:
        initial: first s; how far below 0 it lies sets when sparsity begins.
        threshold: g: "sigmoid" as for convolutional networks, "exp" as for recurrent ones.
        threshold_lr: learning rate of s; without it that of the weight, as in the paper.
        threshold_weight_decay: of s; without it that of the weight, as in the paper.

    Source: Kusupati et al. 2020, Soft Threshold Weight Reparameterization for Learnable Sparsity, equations 3 to 5.
    The paper tunes weight decay and `initial` for each budget: -3200 for 100 epochs of ResNet-50, where decay alone
    draws s towards 0, and -10 for recurrent networks, the default here.

    Examples:
        >>> str_().latent.trained[0].name
        'threshold'
    """
    require_choice("str", "threshold", threshold, ("sigmoid", "exp"))
    require_rate("str", "threshold_lr", threshold_lr)
    require_rate("str", "threshold_weight_decay", threshold_weight_decay)
    g = torch.sigmoid if threshold == "sigmoid" else torch.exp

    def above(weight: SparseWeight) -> Tensor:
        return latent_magnitude(weight) > g(SOFT_THRESHOLD.of(weight))

    update = activate_where(above)
    latent = Latent(
        lambda parts: soft_threshold(parts, g),
        trained=(Trained(SOFT_THRESHOLD.key, one_number(initial), threshold_lr, threshold_weight_decay),),
        reach=lambda parts: parts.active,
    )
    return Method("str", start_by(update), update, timing="after", needs=Need.DENSE_VALUES, latent=latent)
