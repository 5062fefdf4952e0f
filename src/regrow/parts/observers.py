"""What is watched at every step: functions that keep something in `weight.state`."""

from __future__ import annotations

import torch
from torch import Tensor

from regrow.core.method import Observer
from regrow.core.topology import Topology
from regrow.core.weight import SparseWeight

EXPLORATION = ("explored", "placed")
"""The state of a weight that `mark_explored` keeps."""


def momentum(decay: float) -> Observer:
    """Keep v <- decay v + (1 - decay) g over every position, in state "momentum" (numel,), before each step.

    Source: Dettmers and Zettlemoyer 2019, Sparse Networks from Scratch, section 3. The paper reads the optimizer's
    own buffer; a mean of its own works with any optimizer, and the factor 1 - decay changes no ranking.
    """

    def observe(weight: SparseWeight) -> None:
        for first, block in weight.grad_blocks():
            if "momentum" not in weight.state:
                # In half precision the mean of a constant gradient stalls on the way.
                dtype = torch.promote_types(block.dtype, torch.float32)
                weight.state["momentum"] = block.new_zeros(weight.topology.numel, dtype=dtype)
            mean = weight.state["momentum"][first : first + block.numel()]
            mean.lerp_(block.to(mean.dtype), 1 - decay)

    return observe


def momentum_of(weight: SparseWeight) -> Tensor:
    """The running mean of gradients, (numel,).

    Raises:
        ValueError: when the method does not observe it.
    """
    if "momentum" not in weight.state:
        raise ValueError(f"{weight.name} has no running mean of gradients: give the method observe=momentum(decay)")
    return weight.state["momentum"]


def mark_explored(weight: SparseWeight, before: Topology | None = None) -> None:
    """Add the present topology to state "explored", bool (numel,): every position that was ever active.

    State "placed", int64 (), counts how often an entry became active, that of the first topology included; after a
    change of topology, `before` is what it was.

    Source: Liu et al. 2021, Do We Actually Need Dense Over-Parameterization?, section 3.2.
    """
    now = weight.topology
    if "explored" not in weight.state:
        weight.state["explored"] = torch.zeros(now.numel, dtype=torch.bool)
        weight.state["placed"] = torch.zeros((), dtype=torch.int64)
    weight.state["placed"] += now.nnz if before is None else now.without(before).numel()
    explored = weight.state["explored"]
    if now.is_dense:
        explored[:] = True
    else:
        explored[now.indices.to(explored.device)] = True
