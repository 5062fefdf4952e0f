"""What is watched at every step. An observer keeps what it sees in the weight's `state`."""

from __future__ import annotations

from functools import partial

import torch

from regrow.core.method import Observer
from regrow.core.topology import Topology
from regrow.core.weight import SparseWeight
from regrow.parts.remembered import EXPLORED, MOMENTUM, PLACED

EXPLORATION = (EXPLORED.key, PLACED.key)
"""The keys of the state that `mark_explored` keeps."""


def keep_momentum(decay: float) -> Observer:
    """Keep `MOMENTUM`, v <- decay v + (1 - decay) g at every position, (numel,), before each step.

    Source: Dettmers and Zettlemoyer 2019, Sparse Networks from Scratch, section 3. The paper reads the optimizer's
    own buffer; a mean of its own works with any optimizer, and the factor 1 - decay changes no ranking.
    """

    def observe(weight: SparseWeight) -> None:
        for first, block in weight.grad_blocks():
            # In half precision the mean of a constant gradient stalls on the way.
            dtype = torch.promote_types(block.dtype, torch.float32)
            whole = MOMENTUM.begin(weight, partial(block.new_zeros, weight.topology.numel, dtype=dtype))
            whole[first : first + block.numel()].lerp_(block.to(whole.dtype), 1 - decay)

    return observe


def explored_entries(weight: SparseWeight) -> int:
    """How many entries of a weight were ever active.

    Raises:
        ValueError: when the method keeps no record of explored positions, naming the weight.
    """
    record = EXPLORED.of(weight)
    if weight.topology.is_unstructured:
        return int(record.sum())
    return weight.topology.at(record.nonzero().view(-1)).nnz


def mark_explored(weight: SparseWeight, before: Topology | None = None) -> None:
    """Keep `EXPLORED`, every unit that was ever active, and `PLACED`, how often one became active.

    The units of the first topology count too. After a change of topology, `before` is what it was.

    Source: Liu et al. 2021, Do We Actually Need Dense Over-Parameterization?, section 3.2.
    """
    now = weight.topology
    explored = EXPLORED.begin(weight, lambda: torch.zeros(now.places, dtype=torch.bool))
    placed = PLACED.begin(weight, lambda: torch.zeros((), dtype=torch.int64))
    placed += now.active if before is None else now.without(before).numel()
    if now.is_dense:
        explored[:] = True
    else:
        explored[now.indices.to(explored.device)] = True
