"""Masked storage: parameters stay dense tensors that are zero outside their topology.

It works with every model, device and optimizer. Beside what dense training holds it takes one byte per entry (the
mask), four per active entry (its place in its row), and at an update a copy of the gradient. Where a method does not
need inactive gradients, they are zeroed as they accumulate: clipping never sees them. Momentum never sees them at all.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from regrow.core.topology import Topology
from regrow.core.weight import SparseWeight
from regrow.storage.gradient import Gradient
from regrow.storage.rows import DenseRows, blocks_of
from regrow.storage.state import (
    SECOND_MOMENTS,
    forget_history,
    preserves_zeros,
    starting_moment,
    weight_shaped_state,
)
from regrow.storage.stored import Draft, Stored

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def zero_outside(tensor: Tensor, mask: Tensor) -> None:
    """Zero `tensor` in place where `mask` (bool, its shape) is False, also what is not finite.

    Multiplying the bits as integers is exact and three times as fast as multiplying the numbers.
    """
    tensor.detach().view(_BITS[tensor.element_size()]).mul_(mask)


@dataclass
class _Aside:
    """Which gradient tensor the held copy was taken from."""

    source: weakref.ref[Tensor]
    version: int
    """Version counter of that tensor right after its inactive entries were zeroed."""
    lasting: bool = False

    def is_of(self, grad: Tensor) -> bool:
        """Whether the copy is of `grad`."""
        return self.source() is grad


class MaskedParameter(Stored):
    """One dense parameter with its mask, its optimizer and its gradient, shared by its one or several weights.

    Args:
        parameter: contiguous or channels-last, any device and real dtype.
        optimizer: the optimizer that steps it.
        names: canonical name of each equal block of leading rows; a single name for an ordinary weight.
        out_axis: which axis counts the outputs.
        in_axis: which axis counts the inputs.
    """

    storage = "masked"

    def __init__(
        self, parameter: nn.Parameter, optimizer: Optimizer, names: Sequence[str], out_axis: int, in_axis: int
    ) -> None:
        self.parameter = parameter
        self.optimizer = optimizer
        self.gradient = Gradient(parameter, names[0])
        self._mask: Tensor | None = None
        self._everywhere = True
        self._aside: _Aside | None = None
        self._weights = [MaskedWeight(self, *block, out_axis, in_axis) for block in blocks_of(parameter, names)]
        self.gradient.watch(self._arrived)

    @property
    def weights(self) -> Sequence[MaskedWeight]:
        """The weights that it holds."""
        return self._weights

    def become(self, room: int, seed: int) -> Stored:
        """Nothing changes: the parameter stays what it is."""
        return self

    # The gradient

    def watch(self, everywhere: bool) -> None:
        """Whether the coming backward passes leave the gradient at inactive positions in place."""
        self._everywhere = everywhere

    def _arrived(self, grad: Tensor) -> None:
        aside = self._aside
        if aside is not None and not aside.lasting:
            if aside.is_of(grad) and grad._version == aside.version + 1:
                raise RuntimeError(
                    f"{self.gradient.name}: a backward came after mask_gradients() in the same step: call it once, "
                    "after the last backward and before clipping"
                )
            self._forget()
        if not self._everywhere:
            self.mask()

    def mask(self) -> None:
        """Zero the gradient outside the topology."""
        grad = self.parameter.grad
        if grad is not None and self._mask is not None:
            zero_outside(grad, self.mask_on(grad.device))

    def opened(self, loaded: bool) -> None:
        """Zero values outside the topology, and let what was set aside follow the parameter's gradient."""
        super().opened(loaded)
        self._settle()

    def _settle(self) -> None:
        """Scale the held copy as the gradient was scaled since; forget it if the gradient is gone."""
        grad, aside = self.parameter.grad, self._aside
        if aside is None or aside.lasting:
            return
        whole = self.gradient.held
        if grad is None or whole is None or not aside.is_of(grad):
            self._forget()
            return
        active = whole if self._mask is None else whole.abs().mul_(self.mask_on(grad.device))
        before, now = float(active.abs().max()), float(grad.abs().max())
        if before != now and 0 < before < math.inf and now < math.inf:
            whole.mul_(now / before)

    def _forget(self) -> None:
        self._aside = None
        self.gradient.let_go()

    def set_aside(self, lasting: bool = False) -> None:
        """Keep a copy of the gradient at every position, where it is there, and mask the parameter's own."""
        if not self._everywhere:
            self.mask()
            return
        self._settle()
        grad = self.parameter.grad
        if self._aside is None and grad is not None:
            self.gradient.hold()
            self.mask()
            self._aside = _Aside(weakref.ref(grad), grad._version)
        if self._aside is not None:
            self._aside.lasting = lasting

    def closed(self, complete: bool) -> None:
        """Forget the gradient that was set aside."""
        super().closed(complete)
        self._aside = None

    def everywhere(self) -> Tensor:
        """The gradient at every position, of the parameter's shape.

        Raises:
            ValueError: when its inactive entries were zeroed, as the method did not declare that it needs them.
        """
        if self._aside is None and not self._everywhere:
            raise self.gradient.not_kept()
        return self.gradient.read()

    @property
    def looked(self) -> bool:
        """Whether the gradient at every position was set aside, for growth to look at."""
        return self._aside is not None

    # Values and state

    def project(self, state: bool) -> None:
        """Zero values outside the topology, whoever wrote them, and on demand the optimizer's `state`."""
        if self._mask is None:
            return
        zero_outside(self.parameter, self.mask_on(self.parameter.device))
        for tensor in weight_shaped_state(self.optimizer, self.parameter).values() if state else ():
            zero_outside(tensor, self.mask_on(tensor.device))

    def non_zeros(self, topologies: Sequence[Topology]) -> list[int]:
        """How many values at the active entries of such topologies are not zero."""
        blocks = [(w.block(self.parameter), t) for w, t in zip(self._weights, topologies, strict=True)]
        return [int(values[t.entries.to(values.device)].count_nonzero()) for values, t in blocks]

    def strays(self) -> int:
        """How many values outside the topology are not zero."""
        if self._mask is None:
            return 0
        return int((self.parameter.detach() != 0).logical_and_(~self.mask_on(self.parameter.device)).sum())

    def stepped(self) -> None:
        """Project after the optimizer's step, unless it is known to leave zeros at zero."""
        if not preserves_zeros(self.optimizer, self.parameter):
            self.project(state=True)

    def mask_on(self, device: torch.device) -> Tensor:
        """The mask, moved along where the model was moved."""
        assert self._mask is not None
        if self._mask.device != device:
            self._mask = self._mask.to(device)
        return self._mask

    def write_mask(self, rows: slice, mask: Tensor) -> None:
        """Replace the mask of a block of rows."""
        if self._mask is None:
            self._mask = torch.ones_like(self.parameter, dtype=torch.bool, requires_grad=False)
        self.mask_on(self.parameter.device)[rows] = mask.to(self.parameter.device)


def masked_twin(
    other: Draft, topologies: Sequence[Topology], states: Sequence[Mapping[str, Tensor]]
) -> MaskedParameter:
    """The parameter of another storage in masked storage.

    Args:
        other: gives parameter, optimizer and names.
        topologies: of each of its weights.
        states: what each of its weights goes on to remember.
    """
    weights: Sequence[SparseWeight] = other.weights
    names, out_axis, in_axis = [w.name for w in weights], weights[0].out_axis, weights[0].in_axis
    twin = MaskedParameter(other.parameter, other.optimizer, names, out_axis, in_axis)
    for weight, old, topology, state in zip(twin.weights, weights, topologies, states, strict=True):
        weight.pool = old.pool
        weight.state = dict(state)
        weight.topology = topology.at(None)
        weight.rewire(topology)
    return twin


class MaskedWeight(DenseRows):
    """A `SparseWeight` over a block of rows of a masked parameter."""

    owner: MaskedParameter

    def everywhere(self) -> Tensor:
        """The gradient at every position, of the parameter's shape."""
        return self.owner.everywhere()

    def rewire(self, topology: Topology) -> None:
        """Change the topology: survivors keep value and optimizer state, newcomers start at zero."""
        if topology == self.topology:
            return
        topology = topology.to(self.owner.parameter.device)
        old, mask = self.topology, topology.mask.to(self.owner.parameter.device)
        survivors = mask if old.is_dense else mask & old.mask.to(mask.device)
        forget_history(self.owner.optimizer)
        state = weight_shaped_state(self.owner.optimizer, self.owner.parameter)
        moments = {key: self._starting_moment(s, topology) for key, s in state.items() if key in SECOND_MOMENTS}
        for tensor in (self.owner.parameter.detach(), *state.values()):
            zero_outside(tensor[self.rows], survivors.to(tensor.device))
        for key, (positions, moment) in moments.items():
            self.write(state[key], positions, moment)
        self.owner.write_mask(self.rows, mask)
        self.topology = topology

    def restore(self, topology: Topology) -> None:
        """Take on a saved topology without touching values or optimizer state."""
        self.topology = topology.to(self.owner.parameter.device)
        self.owner.write_mask(self.rows, self.topology.mask)

    def _starting_moment(self, moment: Tensor, topology: Topology) -> tuple[Tensor, Tensor]:
        """The newcomers' entries and the second moment they start with, both (n,)."""
        newcomers = topology.without(self.topology)
        grown = self.grads_at(newcomers) if self.owner.looked else None
        positions, owner = topology.entries_of(newcomers), self.owner
        return positions, starting_moment(
            owner.optimizer, owner.parameter, self.active(self.block(moment)), grown, positions.numel()
        )
