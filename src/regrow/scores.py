"""How much each active entry deserves to stay: functions from a weight to (nnz,) scores."""

from __future__ import annotations

import torch
from torch import Tensor

from regrow.weight import SparseWeight


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


def _wide(values: Tensor) -> Tensor:
    """In float32 at least: products of small half-precision numbers would vanish."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def random(weight: SparseWeight) -> Tensor:
    """Independent uniform draws in [0, 1), (nnz,) float64, from the weight's own stream."""
    return torch.from_numpy(weight.generator.uniform(weight.topology.nnz)).to(weight.values().device)
