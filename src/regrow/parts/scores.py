"""How much each active entry deserves to stay: functions from a weight to (nnz,) scores."""

from __future__ import annotations

import torch
from torch import Tensor

from regrow.core.method import Score
from regrow.core.weight import SparseWeight


def unit_scores(weight: SparseWeight, score: Score) -> Tensor:
    """What drops and pruning rank: one number for each active unit, (active,), pooled from those of its entries."""
    return weight.topology.pooled(score(weight), weight.pool)


def magnitude(weight: SparseWeight) -> Tensor:
    """|w|, (nnz,).

    Source: Han et al. 2015, Learning both Weights and Connections, section 3; Zhu and Gupta 2017, section 3.
    """
    return weight.values().abs()


def saliency(weight: SparseWeight) -> Tensor:
    """|w g| with g the gradient of the loss alone, (nnz,): SNIP's connection sensitivity.

    Source: Lee et al. 2019, SNIP, section 4.1, equation 4 before its normalization, which changes no ranking.
    """
    return (_wide(weight.values()) * _wide(weight.grads())).abs()


def taylor(weight: SparseWeight) -> Tensor:
    """(w g)^2 with g the gradient of the loss alone, (nnz,) float64: the first-order change of the loss, squared.

    In double precision, where the square of a small product does not vanish.

    Source: Molchanov et al. 2019, Importance Estimation for Neural Network Pruning, section 3.1, equation 8, for
    single entries; the drop "Taylor_FO" of the code of Liu et al. 2021.
    """
    return (weight.values().double() * weight.grads().double()).square()


def magnitude_and_gradient(gradient_weight: float) -> Score:
    """|w| + gradient_weight |g| with g the gradient that the optimizer is given, (nnz,).

    Unlike rankings of the gradient alone this one depends on its scale: g is as it was clipped, and unscaled. A weight
    that the last backward did not reach has no gradient, which counts as zero.

    Source: Yuan et al. 2021, MEST, section 3.2 (the paper's lambda is `gradient_weight`).
    """

    def score(weight: SparseWeight) -> Tensor:
        magnitudes = _wide(weight.values().abs())
        return magnitudes + gradient_weight * _wide(weight.grads().abs()) if weight.has_grad else magnitudes

    return score


def _wide(values: Tensor) -> Tensor:
    """In float32 at least: products of small half-precision numbers would vanish."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def random(weight: SparseWeight) -> Tensor:
    """Independent uniform draws in [0, 1), (nnz,) float64, from the weight's own stream."""
    return torch.from_numpy(weight.generator.uniform(weight.topology.nnz)).to(weight.values().device)
