"""DynaDiag."""

from __future__ import annotations

import torch

from regrow.core.checks import require_density
from regrow.methods.learned.latent import require_rate
from regrow.methods.recipe import recipe
from regrow.parts import (
    DIAGONAL_COUNT,
    DIAGONAL_LOGITS,
    TEMPERATURE,
    Allocation,
    Diagonals,
    Latent,
    Method,
    Need,
    Probe,
    Rule,
    SparseWeight,
    Start,
    Topology,
    Trained,
    Weights,
    cosine_to,
    diagonals,
    equal_diagonals,
    rewire,
    soft_diagonals,
    uniform,
)


@recipe
def dynadiag(
    density: float | None,
    *,
    until: int,
    temperature: float = 5.0,
    last_temperature: float = 0.05,
    alpha_lr: float | None = None,
    allocate: Allocation = uniform,
) -> Method:
    """DynaDiag: wrapped diagonals of a weight compete, and at `until` the K best of them stay.

    A weight has P diagonals, as many as its longer side, and every entry lies on one. Each has a trained number alpha,
    and the weight is w = a v with a = clamp(K softmax(alpha / T), 0, 1) of the entry's diagonal. T falls along a
    cosine, and every entry is active. At `until` the K largest alpha stay with a = 1, and their values train on.

    Args:
        density: share of the entries that K is for, in (0, 1]: K = ceil(entries of a weight / entries of a diagonal).
        until: optimizer step at which the diagonals are chosen; the published run takes three tenths of its steps.
        temperature: first T, above 0.
        last_temperature: T at `until`, above 0 and at most `temperature`.
        alpha_lr: learning rate of alpha; without it that of the weights, as in the code.
        allocate: how the active entries are shared among the weights: `uniform`, `er`, `erk`, or densities by name.

    Source: Tyagi et al. 2025, Dynamic Sparse Training of Diagonally Sparse Networks (DynaDiag), by its
    published code (TempSoftmaxDiagLinear). It is for linear layers; a convolution is here the matrix of its first axis
    by all others. First alpha are 1 / P. T moves with every step, there with every epoch. First values are the module's
    own. The code, too, computes with all diagonals until they are chosen.

    Examples:
        >>> method = dynadiag(0.1, until=300)
        >>> method.due(300), method.due(301)
        (True, False)
    """
    require_density("dynadiag", density)
    require_rate("dynadiag", "alpha_lr", alpha_lr)
    if until < 1:
        raise ValueError(f"dynadiag: until must be step 1 or later, got {until}: the diagonals are chosen there")
    if not 0 < last_temperature <= temperature:
        raise ValueError(
            f"dynadiag: T must fall and stay above 0, got temperature {temperature:g} and last_temperature "
            f"{last_temperature:g}"
        )
    schedule = cosine_to(last_temperature)(temperature, until, 0)

    def make(weights: Weights, probe: Probe) -> None:
        counts = allocate(weights, None, None if density is None else weights.total(density))
        for weight, count in zip(weights, counts, strict=True):
            chosen = -(-count // max(1, Diagonals.of(weight.shape).length))
            DIAGONAL_COUNT.set(weight, torch.tensor(max(1, chosen)))
        _compute(weights, [w.topology for w in weights], temperature)

    def apply(weights: Weights, step: int) -> None:
        topologies = [_best(w) if step == until else w.topology for w in weights]
        _compute(weights, topologies, 0.0 if step == until else schedule(step))

    latent = Latent(
        soft_diagonals,
        trained=(Trained(DIAGONAL_LOGITS.key, equal_diagonals, alpha_lr),),
        reach=lambda parts: parts.active,
    )
    return Method(
        "dynadiag",
        Start(make, require=lambda weights: weights.require(density)),
        (Rule(apply, lambda step: step <= until),),
        timing="after",
        needs=Need.DENSE_VALUES,
        latent=latent,
    )


def _compute(weights: Weights, topologies: list[Topology], temperature: float) -> None:
    # All temperatures first, since blocks of one parameter are computed together.
    for weight in weights:
        TEMPERATURE.set(weight, torch.tensor(temperature, dtype=torch.float64))
    rewire(weights, topologies)


def _best(weight: SparseWeight) -> Topology:
    whole = Diagonals.of(weight.shape)
    score = whole.spread(DIAGONAL_LOGITS.of(weight)).reshape(-1)
    return diagonals(weight, score, int(DIAGONAL_COUNT.of(weight)) * whole.length)
