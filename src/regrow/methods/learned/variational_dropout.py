"""Variational dropout."""

from __future__ import annotations

from torch import Tensor

from regrow.methods.learned.latent import STRAIGHT, require_penalty, require_rate
from regrow.methods.recipe import recipe
from regrow.parts import (
    LATENT,
    LOG_VARIANCE,
    Latent,
    Method,
    Parts,
    SparseWeight,
    Trained,
    activate_where,
    dropout_divergence,
    filled_with,
    log_dropout,
    noisy,
    start_by,
)


@recipe
def variational_dropout(
    *,
    penalty: float = 1 / 60_000,
    threshold: float = 3.0,
    log_variance: float = -10.0,
    variance_lr: float | None = None,
) -> Method:
    """Sparse variational dropout: every entry has a trained variance, and entries that are mostly noise go.

    A training forward sees v + sigma e with e of variance 1; the loss gets penalty times the divergence from the
    log-uniform prior, summed over entries. Evaluation, `state_dict`, counts and exports see v where
    log alpha = log sigma^2 - log v^2 is below `threshold`, else 0: what is active is an outcome of the penalty.

    Args:
        penalty: weight of the divergence, at least 0: one over the number of examples where the loss is a mean.
        threshold: log alpha from which an entry is inactive.
        log_variance: first log sigma^2.
        variance_lr: learning rate of log sigma^2; without it that of the weights.

    Source: Molchanov et al. 2017, Variational Dropout Sparsifies Deep Neural Networks, sections 4.1 to 4.4 (additive
    noise, equation 14). One draw of the weights serves all forwards of an optimizer step, where the paper draws
    activations for each example, at less variance. Noise is `Stream.normal`. log sigma^2 has no weight decay.

    Examples:
        >>> variational_dropout().latent.trained[0].name
        'log_variance'
    """
    require_penalty("variational_dropout", penalty)
    require_rate("variational_dropout", "variance_lr", variance_lr)

    def noise_ratio(weight: SparseWeight) -> Tensor:
        values = LATENT.flat(weight)
        return log_dropout(values.to(LOG_VARIANCE.of(weight).dtype), LOG_VARIANCE.flat(weight))

    def divergence(parts: Parts, step: int) -> Tensor:
        log_alpha = log_dropout(parts.latent, LOG_VARIANCE.of(parts))
        return penalty * dropout_divergence(log_alpha).sum()

    update = activate_where(lambda weight: noise_ratio(weight) < threshold)
    latent = Latent(
        noisy,
        trained=(Trained(LOG_VARIANCE.key, filled_with(log_variance), variance_lr, 0.0),),
        penalty=divergence,
        noise=lambda stream, count: stream.normal(count),
    )
    return Method("variational_dropout", start_by(update), update, timing="after", needs=STRAIGHT, latent=latent)
