"""Weights held as plain tensors, with what the parts of a method may ask of one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from hypothesis import strategies as st
from torch import Tensor

from regrow.core.draws import Stream
from regrow.core.method import Regrow, Rule
from regrow.core.topology import Topology
from regrow.core.units import Pool, mean
from regrow.core.weight import SparseWeight, Weights

POLICIES: list[Regrow] = ["keep", "reset", "forbid"]


class Fake:
    """A weight held as plain flat tensors, with what the updates may ask of one."""

    out_axis, in_axis = 0, 1

    def __init__(
        self,
        dense: Sequence[float] | Tensor,
        active: Sequence[int] | None = None,
        grad: Sequence[float] | Tensor | None = None,
        name: str = "w",
    ) -> None:
        values = torch.as_tensor(dense, dtype=torch.float64).reshape(-1)
        self.name = name
        self.shape = (1, values.numel())
        self.topology = Topology(self.shape, None if active is None else torch.tensor(active, dtype=torch.int64))
        self.dense = values * self.topology.mask.view(-1)
        self.grad = None if grad is None else torch.as_tensor(grad, dtype=torch.float64).reshape(-1)
        self.has_grad = True
        self.pool: Pool = mean
        self.generator = Stream(0, name, 1)
        self.state: dict[str, Tensor] = {}
        self.rewired = 0

    def values(self) -> Tensor:
        return self.dense[self.topology.indices].clone()

    def set_values(self, values: Tensor) -> None:
        self.dense[self.topology.indices] = values

    def grads(self) -> Tensor:
        assert self.grad is not None
        return self.grad[self.topology.indices]

    def grad_blocks(self) -> Iterator[tuple[int, Tensor]]:
        assert self.grad is not None
        for first in range(0, self.grad.numel(), 5):
            yield first, self.grad[first : first + 5]

    def rewire(self, topology: Topology) -> None:
        self.dense *= topology.mask.view(-1) & self.topology.mask.view(-1)
        self.topology = topology
        self.rewired += 1

    def active(self) -> set[int]:
        return set(self.topology.indices.tolist())


def together(*weights: SparseWeight) -> Weights:
    return Weights(weights)


def run(rules: tuple[Rule, ...], weights: Weights, step: int = 1) -> None:
    for rule in rules:
        if rule.due(step):
            rule.apply(weights, step)


@st.composite
def fakes(draw: st.DrawFn) -> Fake:
    numel = draw(st.integers(1, 30))
    active = sorted(draw(st.sets(st.integers(0, numel - 1))))
    few = st.sampled_from([-2.0, -1.0, 0.0, 0.5, 1.0])
    values, grad = (draw(st.lists(few, min_size=numel, max_size=numel)) for _ in range(2))
    return Fake(values, active, grad, name=draw(st.text("abc", min_size=1, max_size=3)))
