"""Compressed storage: only active values exist, in the weight, its gradient and the optimizer's state.

A weight costs 4 bytes per active entry (in float32) for each of value, gradient and optimizer state, and 12 for the
topology as the kernels read it. The gradient at inactive positions is never formed as a whole: growth reads it in
blocks of rows from the operands that the step of an update keeps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from regrow.core.topology import Topology
from regrow.core.weight import SparseWeight
from regrow.nn import SparseModule
from regrow.storage.memory import Memory
from regrow.storage.operands import KeptOperands
from regrow.storage.state import (
    SECOND_MOMENTS,
    preserves_zeros,
    starting_moment,
    weight_shaped_state,
)
from regrow.storage.stored import Draft, Stored

_BLOCK = 1 << 20
"""Entries of the gradient that are formed at once."""


class CompressedParameter(Stored):
    """One parameter of which only active values exist, its modules, its optimizer and what growth may read.

    Args:
        draft: what it was before.
        holders: every module that holds the parameter, in its sparse form already, with the parameter's name.
        shape: the dense shape.
        memory: is asked before operands are kept for an update.
    """

    storage = "compressed"

    def __init__(
        self, draft: Draft, holders: Sequence[tuple[SparseModule, str]], shape: Sequence[int], memory: Memory
    ) -> None:
        self.parameter = draft.parameter
        self.optimizer = draft.optimizer
        self.gradient = draft.gradient
        self.shape = tuple(shape)
        self.holders = list(holders)
        self.operands = KeptOperands(self.gradient, memory)
        rows = self.whole.rows // len(draft.weights)
        self._weights = [
            CompressedWeight(self, weight, (i * rows, (i + 1) * rows)) for i, weight in enumerate(draft.weights)
        ]
        self.gradient.watch(self._arrived)

    @property
    def weights(self) -> Sequence[CompressedWeight]:
        """The weights that it holds."""
        return self._weights

    @property
    def whole(self) -> Topology:
        """The topology of all blocks, sharing memory with the index of the kernels."""
        module, name = self.holders[0]
        return module.topology(name)

    @property
    def nnz(self) -> int:
        """Active entries of all blocks."""
        module, name = self.holders[0]
        return module.nnz(name)

    def become(self, room: int, seed: int) -> Stored:
        """Nothing changes: it is compressed."""
        return self

    def remove(self) -> None:
        """Detach from the parameter, which stays compressed and trains with the topology that it has."""
        super().remove()
        self.watch(False)

    # The gradient

    def watch(self, everywhere: bool) -> None:
        """Whether the coming backward passes keep what the gradient at inactive positions is made of."""
        if everywhere != self.operands.watched:
            self.operands.watch(everywhere)
            for module, name in self.holders:
                if everywhere:
                    module.keys[name] = self.operands.key
                else:
                    module.keys.pop(name, None)

    def _arrived(self, grad: Tensor) -> None:
        if self.operands.watched:
            self.operands.arrived(grad)

    def opened(self, loaded: bool) -> None:
        """Zero the inert tail, and let what was kept follow the parameter's gradient."""
        super().opened(loaded)
        self.operands.settle(lambda: self.whole)

    def set_aside(self, lasting: bool = False) -> None:
        """What growth reads lies in the operands, apart from the gradient; hold it if it is to be `lasting`."""
        self.mask()
        if self.operands.watched:
            self.operands.settle(lambda: self.whole)
            if lasting:
                self.operands.hold()

    def mask(self) -> None:
        """Zero the inert tail of the gradient."""
        grad = self.parameter.grad
        if grad is not None and grad.numel() > (nnz := self.nnz):
            grad[nnz:] = 0

    def closed(self, complete: bool) -> None:
        """Forget the operands that were held for an update, or else the kept ones; the next step's stay."""
        super().closed(complete)
        self.operands.forget()

    @property
    def looked(self) -> bool:
        """Whether there is a gradient at every position for growth to look at, if only from other ranks."""
        return self.operands.looked

    def kept(self) -> KeptOperands:
        """What the gradient at every position is read from.

        Raises:
            ValueError: when it was not kept, as the method did not declare that it needs it.
        """
        if not self.operands.looked:
            raise self.gradient.not_kept()
        return self.operands

    # Values and state

    def project(self, state: bool) -> None:
        """Zero the inert tail, whoever wrote to it, and on demand that of the optimizer's `state`."""
        nnz = self.nnz
        if self.parameter.numel() == nnz:
            return
        self.parameter.detach()[nnz:] = 0
        for tensor in weight_shaped_state(self.optimizer, self.parameter).values() if state else ():
            tensor[nnz:] = 0

    def stepped(self) -> None:
        """Project after the optimizer's step, unless it is known to leave zeros at zero."""
        if not preserves_zeros(self.optimizer, self.parameter):
            self.project(state=True)

    def non_zeros(self, topologies: Sequence[Topology]) -> list[int]:
        """How many values are not zero, whatever the topologies: values have no place of their own here."""
        return [int(w.values().count_nonzero()) for w in self._weights]

    def rewire(self, new: Topology) -> None:
        """Change the topology of the whole parameter, carrying values, gradient and state of the survivors."""
        old = self.whole
        source = new.entry_ranks_in(old)
        state = weight_shaped_state(self.optimizer, self.parameter)
        moments = {key: self._moments(s, old, new) for key, s in state.items() if key in SECOND_MOMENTS}
        newcomers = source < 0
        source.clamp_(min=0)
        gone = torch.zeros((), dtype=self.parameter.dtype)
        grad, held = self.parameter.grad, self.gradient.held
        # Of the next step, where this update waited for an optimizer that did not step.
        early = self.operands.multiple(grad, old) if grad is not None and self.operands.has_next else None
        for tensor in (self.parameter.detach(), *state.values(), *(g for g in (grad, held) if g is not None)):
            if old.nnz:
                tensor[: new.nnz] = torch.where(newcomers, gone.to(tensor), tensor.index_select(0, source))
            tensor[new.nnz :] = 0
        for key, moment in moments.items():
            state[key][: new.nnz][newcomers] = moment
        if grad is not None and early is not None:
            positions = new.at(new.without(old))
            self.operands.grow_early(grad[: new.nnz], newcomers, positions, early)
        del source, newcomers
        self.restore(new)

    def restore(self, topology: Topology) -> None:
        """Take on a topology of the whole parameter, leaving values where they are."""
        for module, name in self.holders:
            module.rewire(name, topology)

    def _moments(self, moment: Tensor, old: Topology, new: Topology) -> Tensor:
        """The second moments that newcomers start with, in their order."""
        grown = self.operands.at(new.at(new.without(old))) if self.looked else None
        parts, first = [], 0
        for weight in self._weights:
            before, after = old.block(*weight.rows), new.block(*weight.rows)
            begin, count = old.first_entry(weight.rows[0]), after.at(after.without(before)).nnz
            active = moment[begin : begin + before.nnz]
            here = None if grown is None else grown[first : first + count]
            parts.append(starting_moment(self.optimizer, self.parameter, active, here, count))
            first += count
        return torch.cat(parts)


class CompressedWeight:
    """A `SparseWeight` over a block of rows of a compressed parameter.

    Args:
        owner: of the parameter.
        draft: what the weight was before.
        rows: of the parameter's grid of units, from first to last.
    """

    def __init__(self, owner: CompressedParameter, draft: SparseWeight, rows: tuple[int, int]) -> None:
        self.owner = owner
        self.rows = rows
        self.pool = draft.pool
        self.name = draft.name
        self.out_axis = draft.out_axis
        self.in_axis = draft.in_axis
        self.shape = draft.shape
        self.generator = draft.generator
        self.state = draft.state

    @property
    def topology(self) -> Topology:
        """What is active."""
        return self.owner.whole.block(*self.rows)

    @property
    def has_grad(self) -> bool:
        """Whether the last backward reached this weight."""
        return self.owner.gradient.reached

    def _active(self, tensor: Tensor) -> Tensor:
        """This weight's part of a tensor that is shaped like the parameter, (nnz,): a view."""
        whole = self.owner.whole
        return tensor.detach()[whole.first_entry(self.rows[0]) : whole.first_entry(self.rows[1])]

    def values(self) -> Tensor:
        """Active values, (nnz,)."""
        return self._active(self.owner.parameter).clone()

    def set_values(self, values: Tensor) -> None:
        """Replace the active values by `values` (nnz,)."""
        self._active(self.owner.parameter).copy_(values)

    def grads(self) -> Tensor:
        """Gradients at the active entries, (nnz,)."""
        return self._active(self.owner.gradient.read())

    def grad_blocks(self) -> Iterator[tuple[int, Tensor]]:
        """The gradient at every position, in blocks of whole rows of units."""
        kept, unit, size = self.owner.kept(), self.topology.unit[0], math.prod(self.shape[1:])
        low, high = self.rows[0] * unit, min(self.rows[1] * unit, self.owner.shape[0])
        step = max(unit, _BLOCK // max(1, size) // unit * unit)
        for row in range(low, high, step):
            yield (row - low) * size, kept.rows(row, min(high, row + step), size)

    def grads_at(self, positions: Tensor) -> Tensor:
        """The gradient at the entries of the units at ascending `positions` (n,)."""
        whole = self.owner.whole
        return self.owner.kept().at(whole.at(positions + self.rows[0] * whole.row_size))

    def rewire(self, topology: Topology) -> None:
        """Change the topology: survivors keep value and optimizer state, newcomers start at zero."""
        if topology != self.topology:
            self.owner.rewire(self._whole_with(topology))

    def restore(self, topology: Topology) -> None:
        """Take on a saved topology without touching values or optimizer state."""
        self.owner.restore(self._whole_with(topology))

    def _whole_with(self, topology: Topology) -> Topology:
        """The topology of the whole parameter, with this block's replaced."""
        return Topology.stack([topology if w is self else w.topology for w in self.owner.weights])
