"""Weights that are computed from others: how topologies are chosen, maps from latent values, and penalties.

The maps are pure functions of `Parts`; gradients are autograd's.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from regrow.core import selection
from regrow.core.method import Allocation, Parts, Rule, Start, Structure, Update
from regrow.core.topology import Topology
from regrow.core.weight import Shaped, SparseWeight, Weights
from regrow.parts.remembered import (
    DIAGONAL_COUNT,
    DIAGONAL_LOGITS,
    LATENT,
    LOG_VARIANCE,
    MOVEMENT_SCORES,
    SCALE,
    SOFT_THRESHOLD,
    TEMPERATURE,
)
from regrow.parts.structures import Diagonals

_log = logging.getLogger("regrow")

DenseScore = Callable[[SparseWeight], Tensor]
"""How much each position deserves to be active, active now or not: weight -> (numel,)."""


def latent_magnitude(weight: SparseWeight) -> Tensor:
    """|v| of the latent values at every position, (numel,); a `DenseScore`."""
    return LATENT.flat(weight).abs()


def activate_highest(
    density: Callable[[int], float] | None,
    score: DenseScore,
    allocate: Allocation,
    *,
    last: float | None,
    structure: Structure | None = None,
) -> Update:
    """After every step activate the positions of highest `score`, in counts of `allocate`; all may come back.

    Args:
        density: step -> active share; None leaves the counts to an explicit allocation.
        score: of every position; equal ones go to the lower position.
        allocate: shares the total among the weights.
        last: the density in the end, which must leave something active.
        structure: which patterns are allowed; None allows all.
    """

    def apply(weights: Weights, step: int) -> None:
        scores = [score(w) for w in weights]
        counts = ranked_counts(weights, scores, None if density is None else density(step), allocate)
        chosen = [highest_positions(w, s, n, structure) for w, s, n in zip(weights, scores, counts, strict=True)]
        for weight, topology in zip(weights, chosen, strict=True):
            weight.rewire(topology)

    return (Rule(apply, require=lambda weights: weights.require(last)),)


def ranked_counts(weights: Weights, scores: list[Tensor], density: float | None, allocate: Allocation) -> list[int]:
    """How many entries each weight gets when all its positions can be active."""
    whole = [Shaped(w.name, w.shape, Topology(w.shape), w.out_axis, w.in_axis) for w in weights]
    return allocate(whole, scores, None if density is None else weights.total(density))


def highest_positions(weight: SparseWeight, score: Tensor, count: int, structure: Structure | None = None) -> Topology:
    """The `count` positions of highest `score` (numel,).

    Raises:
        ValueError: when a score is NaN, naming the weight.
    """
    if structure is not None:
        return structure(weight, score, count)
    if count == score.numel():
        return Topology(weight.shape)
    try:
        return Topology(weight.shape, selection.highest(score, count))
    except ValueError as error:
        raise ValueError(f"{weight.name}: {error}") from None


def activate_where(condition: DenseScore) -> Update:
    """After every step activate the positions where `condition` holds: the counts are an outcome.

    A weight that loses its last entry is named in the log `regrow`.

    Raises:
        ValueError: from the update, when a latent value is NaN, naming the weight.
    """

    def apply(weights: Weights, step: int) -> None:
        for weight in weights:
            values = LATENT.of(weight)
            if not selection.is_finite(values) and bool(values.isnan().any()):
                bad = int(values.isnan().sum())
                raise ValueError(f"{weight.name}: {bad:,} of {values.numel():,} values are NaN: training has diverged")
        chosen = [condition(w) for w in weights]
        for weight, here in zip(weights, chosen, strict=True):
            if weight.topology.nnz and not bool(here.any()):
                _log.warning("step %d: the last of the %s entries of %s went", step, f"{here.numel():,}", weight.name)
            weight.rewire(Topology(weight.shape, None if bool(here.all()) else here.nonzero().view(-1)))

    return (Rule(apply),)


def start_by(update: Update) -> Start:
    """A start that does what `update` does after a step."""

    def make(weights: Weights, probe: object) -> None:
        for rule in update:
            rule.apply(weights, 0)

    def require(weights: Weights) -> None:
        for rule in update:
            rule.require(weights)

    return Start(make, require=require)


def straight_through(parts: Parts) -> Tensor:
    """The latent values themselves. The weight is zero outside the topology; the gradient passes as if it were not.

    Source: Bengio et al. 2013, Estimating or Propagating Gradients Through Stochastic Neurons, section 4.
    """
    return parts.latent


def gated(parts: Parts) -> Tensor:
    """v times a gate that is 1 where active, else 0, whose gradient goes straight to `MOVEMENT_SCORES`.

    dL/dv = gate dL/dw and dL/ds = v dL/dw.

    Source: Sanh et al. 2020, Movement Pruning, section 4, equations 1 and 2.
    """
    scores = MOVEMENT_SCORES.of(parts)
    return parts.latent * (parts.active + scores - scores.detach())


def soft_threshold(parts: Parts, g: Callable[[Tensor], Tensor]) -> Tensor:
    """sign(v) max(|v| - g(s), 0) with s the `SOFT_THRESHOLD`, (1,).

    Source: Kusupati et al. 2020, Soft Threshold Weight Reparameterization, equation 3.
    """
    return parts.latent.sign() * F.relu(parts.latent.abs() - g(SOFT_THRESHOLD.of(parts)))


def soft_diagonals(parts: Parts) -> Tensor:
    """v times clamp(K softmax(alpha / T), 0, 1) of its diagonal; at T = 0 the active v themselves.

    alpha are `DIAGONAL_LOGITS`, K is `DIAGONAL_COUNT` and T the `TEMPERATURE`.

    Source: Tyagi et al. 2025, Dynamic Sparse Training of Diagonally Sparse Networks, by its published code.
    """
    temperature = TEMPERATURE.of(parts)
    if not temperature:
        return parts.latent * parts.active
    soft = (DIAGONAL_LOGITS.of(parts) / temperature).softmax(0)
    shares = (DIAGONAL_COUNT.of(parts) * soft).clamp(0, 1)
    return parts.latent * Diagonals.of(parts.latent.shape).spread(shares).reshape(parts.latent.shape)


def shrunk(parts: Parts, m: int) -> Tensor:
    """`SCALE` times sign(v) max(|v| - t, 0), t the largest inactive |v| of each `m` consecutive inputs, or 0.

    The gradient passes to v as if the weight were v.

    Source: Hu et al. 2024, S-STE, by its published code.
    """
    values = parts.latent.detach()
    hidden = (values.abs() * ~parts.active).movedim(parts.in_axis, -1)
    inputs = hidden.shape[-1]
    groups = F.pad(hidden, (0, -inputs % m)).reshape(*hidden.shape[:-1], -(-inputs // m), m)
    threshold = groups.amax(-1).repeat_interleave(m, -1)[..., :inputs].movedim(-1, parts.in_axis)
    # In this order, the difference is exactly zero and the weight is exactly what is computed.
    return SCALE.of(parts) * values.sign() * F.relu(values.abs() - threshold) + (parts.latent - values)


def noisy(parts: Parts) -> Tensor:
    """v + sigma e with log sigma^2 the `LOG_VARIANCE`; v where there is no noise.

    Source: Molchanov et al. 2017, Variational Dropout Sparsifies Deep Neural Networks, equation 11.
    """
    if parts.noise is None:
        return parts.latent
    return parts.latent + (LOG_VARIANCE.of(parts) / 2).exp() * parts.noise


GATE_LOW, GATE_HIGH = -0.1, 1.1
"""The interval to which a concrete gate is stretched. Source: Louizos et al. 2018, section 4.1."""


def hard_concrete(log_alpha: Tensor, noise: Tensor | None, temperature: float) -> Tensor:
    """clip(s (GATE_HIGH - GATE_LOW) + GATE_LOW, 0, 1) with s = sigmoid((log u - log(1 - u) + log_alpha) / temperature).

    Args:
        log_alpha: of any shape.
        noise: u in [0, 1), of that shape, kept 1e-6 away from both ends; None takes s = sigmoid(log_alpha).
        temperature: above 0.

    Source: Louizos et al. 2018, Learning Sparse Neural Networks through L0 Regularization, equations 10, 11 and 13.
    """
    if noise is None:
        s = log_alpha.sigmoid()
    else:
        s = ((noise.clamp(1e-6, 1 - 1e-6).logit() + log_alpha) / temperature).sigmoid()
    return (s * (GATE_HIGH - GATE_LOW) + GATE_LOW).clamp(0, 1)


def open_probability(log_alpha: Tensor, temperature: float) -> Tensor:
    """P(gate > 0) = sigmoid(log_alpha - temperature log(-GATE_LOW / GATE_HIGH)).

    Source: Louizos et al. 2018, equation 12.
    """
    return (log_alpha - temperature * math.log(-GATE_LOW / GATE_HIGH)).sigmoid()


def log_dropout(latent: Tensor, log_variance: Tensor) -> Tensor:
    """log alpha = log sigma^2 - log theta^2, clipped to [-8, 8] as in the code.

    Source: Molchanov et al. 2017, Variational Dropout Sparsifies Deep Neural Networks, section 4.2.
    """
    return (log_variance - (latent.square() + 1e-8).log()).clamp(-8, 8)


def dropout_divergence(log_alpha: Tensor) -> Tensor:
    """KL of the posterior from the log-uniform prior: k1 - k1 sigmoid(k2 + k3 a) + log(1 + exp(-a)) / 2.

    Source: Molchanov et al. 2017, equation 14.
    """
    return 0.63576 * (1 - (1.87320 + 1.48695 * log_alpha).sigmoid()) + F.softplus(-log_alpha) / 2


def filled_with(value: float) -> Callable[[Parts], Tensor]:
    """First values: `value` at every position."""
    return lambda parts: torch.full_like(parts.latent, value)


def equal_diagonals(parts: Parts) -> Tensor:
    """First values: 1 / P for each of the P diagonals of a weight, (P,)."""
    number = Diagonals.of(parts.latent.shape).number
    return parts.latent.new_full((number,), 1 / max(1, number))


def one_number(value: float) -> Callable[[Parts], Tensor]:
    """First values: one number, (1,)."""
    return lambda parts: parts.latent.new_full((1,), value)
