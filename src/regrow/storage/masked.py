"""Masked storage: parameters stay dense tensors that are zero outside their topology.

Works with every model, device and optimizer. Beside what dense training holds it takes one byte per entry (the mask),
four per active entry (its place in its row), and at an update a copy of the gradient. Where a method does not need
them, inactive gradients are zeroed as they accumulate, so clipping never sees them; momentum never sees them at all.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from regrow.core import selection
from regrow.core.draws import Stream
from regrow.core.topology import Topology
from regrow.storage.state import (
    SECOND_MOMENTS,
    forget_other_state,
    preserves_zeros,
    starting_moment,
    weight_shaped_state,
)

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def zero_outside(tensor: Tensor, mask: Tensor) -> None:
    """Zero `tensor` in place where `mask` (bool, its shape) is False, also what is not finite.

    Multiplying the bits as integers is exact and three times as fast as multiplying the numbers.
    """
    tensor.detach().view(_BITS[tensor.element_size()]).mul_(mask)


class MaskedParameter:
    """One dense parameter with its mask, its optimizer and its gradient, shared by its one or several weights.

    Args:
        parameter: contiguous or channels-last, any device and real dtype.
        optimizer: the optimizer that steps it.
        names: canonical name of each equal block of leading rows; a single name for an ordinary weight.
        out_axis: which axis counts the outputs.
        in_axis: which axis counts the inputs.
    """

    def __init__(
        self, parameter: nn.Parameter, optimizer: Optimizer, names: Sequence[str], out_axis: int, in_axis: int
    ) -> None:
        self.parameter = parameter
        self.optimizer = optimizer
        self.keep_dense = False
        """Whether the coming backward passes leave the gradient at inactive positions in place."""
        self.fresh = False
        """Whether a backward reached the parameter since the last step began."""
        self.holding = False
        """Whether what was set aside outlives the next backward, for an update that is still to come."""
        self.reached = False
        """Whether a backward reached the parameter since the last step ended."""
        self.mask: Tensor | None = None
        self._held: Tensor | None = None
        self._source: tuple[weakref.ref[Tensor], int] | None = None
        self._scale = 1.0
        rows = parameter.shape[0] // len(names)
        self.weights = [
            MaskedWeight(self, name, slice(i * rows, (i + 1) * rows), out_axis, in_axis) for i, name in enumerate(names)
        ]
        accumulated = weakref.WeakMethod(self._accumulated)

        def hook(parameter: Tensor) -> None:
            """Weak, since the garbage collector does not see through a tensor's hooks."""
            if (call := accumulated()) is not None:
                call(parameter)

        self._handle = parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]

    def require_free(self) -> None:
        """Nothing can be in the way."""

    def materialize(self, room: int, seed: int) -> None:
        """Nothing changes: the parameter stays what it is."""

    def remove(self) -> None:
        """Detach from the parameter, which keeps its values."""
        self._handle.remove()

    def _accumulated(self, parameter: Tensor) -> None:
        """After each backward: mask the new gradient, unless it is wanted at every position."""
        grad = parameter.grad
        if grad is None:
            return
        self.fresh = self.reached = True
        if self._held is not None and not self.holding:
            if self._is_source(grad) and self._source is not None and grad._version == self._source[1] + 1:
                raise RuntimeError(
                    f"{self.weights[0].name}: a backward came after mask_gradients() in the same step: call it once, "
                    "after the last backward and before clipping"
                )
            self._held = None
        if not self.keep_dense:
            self.mask_gradient()

    def mask_gradient(self) -> None:
        """Zero the gradient outside the topology."""
        grad = self.parameter.grad
        if grad is not None and self.mask is not None:
            zero_outside(grad, self.mask_on(grad.device))

    def _is_source(self, grad: Tensor | None) -> bool:
        return grad is not None and self._source is not None and self._source[0]() is grad

    def settle(self) -> None:
        """Make what was set aside agree with the parameter's gradient: as much clipped or unscaled, or forgotten."""
        grad = self.parameter.grad
        if self._held is None or self.holding:
            return
        if grad is None or not self._is_source(grad):
            self._held = None
            return
        largest = self._held if self.mask is None else self._held.abs().mul_(self.mask_on(grad.device))
        before, now = float(largest.abs().max()), float(grad.abs().max())
        if before != now and 0 < before < math.inf and now < math.inf:
            self._held.mul_(now / before)

    def set_aside(self) -> None:
        """Keep a copy of the gradient at every position until `release`, and mask the parameter's own."""
        self.settle()
        grad = self.parameter.grad
        if self._held is None and grad is not None:
            self._held = grad.detach().clone()
            self.mask_gradient()
            self._source = weakref.ref(grad), grad._version

    def use_scale(self, scale: float) -> None:
        """Divide by `scale` whatever gradients are read: a fused optimizer's step begins with scaled ones."""
        self._scale = scale

    def release(self) -> None:
        """Forget the gradient that was set aside."""
        self._held = None
        self.holding = False
        self._scale = 1.0

    def _latest(self) -> Tensor | None:
        """What was set aside, or else the parameter's gradient."""
        return self._held if self._held is not None else self.parameter.grad

    def gradient(self) -> Tensor:
        """The gradient, of the parameter's shape; at every position where it was kept, else at the active ones.

        Raises:
            ValueError: when no backward reached the parameter.
        """
        grad = self._latest()
        if grad is None:
            name = self.weights[0].name
            raise ValueError(f"{name} has no gradient: call loss.backward() before optimizer.step()")
        return grad if self._scale == 1 else grad / self._scale

    def everywhere(self) -> Tensor:
        """The gradient at every position, of the parameter's shape.

        Raises:
            ValueError: when its inactive entries were zeroed, as the method did not declare that it needs them.
        """
        if self._held is None and not self.keep_dense:
            raise ValueError(
                f"{self.weights[0].name}: the gradient at inactive positions is not kept here: declare it in the "
                "method's needs (Need.GRADIENT or Need.EVERY_GRADIENT)"
            )
        return self.gradient()

    @property
    def looked(self) -> bool:
        """Whether the gradient at every position was set aside, for growth to look at."""
        return self._held is not None

    def require_finite_gradient(self) -> None:
        """Raise ValueError when the gradient that an update would read is not finite."""
        grad = self._latest()
        if grad is not None and not selection.is_finite(grad):
            bad = int((~grad.isfinite()).sum())
            raise ValueError(
                f"{self.weights[0].name}: {bad:,} of {grad.numel():,} gradients are not finite at an update: lower the "
                "learning rate, or skip such steps with a gradient scaler"
            )

    def project(self) -> None:
        """Zero values outside the topology, whoever wrote them."""
        if self.mask is not None:
            zero_outside(self.parameter, self.mask_on(self.parameter.device))

    def project_state(self) -> None:
        """Zero optimizer state outside the topology."""
        if self.mask is not None:
            for state in weight_shaped_state(self.optimizer, self.parameter).values():
                zero_outside(state, self.mask_on(state.device))

    def stepping(self, step: int) -> None:
        """Nothing to do: the optimizer steps the values that the model holds."""

    def stepped(self) -> None:
        """Project after the optimizer's step, unless it is known to leave zeros at zero."""
        if not preserves_zeros(self.optimizer, self.parameter):
            self.project()
            self.project_state()

    def mask_on(self, device: torch.device) -> Tensor:
        """The mask, moved along where the model was moved."""
        assert self.mask is not None
        if self.mask.device != device:
            self.mask = self.mask.to(device)
        return self.mask

    def write_mask(self, rows: slice, mask: Tensor) -> None:
        """Replace the mask of a block of rows."""
        if self.mask is None:
            self.mask = torch.ones_like(self.parameter, dtype=torch.bool, requires_grad=False)
        self.mask_on(self.parameter.device)[rows] = mask.to(self.parameter.device)


class MaskedWeight:
    """A `SparseWeight` over a block of rows of a dense parameter."""

    def __init__(self, owner: MaskedParameter, name: str, rows: slice, out_axis: int, in_axis: int) -> None:
        self.owner = owner
        self.name = name
        self.rows = rows
        self.out_axis = out_axis
        self.in_axis = in_axis
        self.shape = tuple(owner.parameter[rows].shape)
        self.topology = Topology(self.shape)
        self.generator = Stream(0, name, 0)
        self.state: dict[str, Tensor] = {}

    @property
    def has_grad(self) -> bool:
        """Whether the last backward reached this weight; a gradient that someone zeroed or wrote is looked at."""
        grad = self.owner.parameter.grad
        return grad is not None and (self.owner.reached or bool(grad.any()))

    def _block(self, tensor: Tensor) -> Tensor:
        """This weight's rows of a parameter-shaped tensor, (numel,): a view where memory allows."""
        return tensor.detach()[self.rows].reshape(-1)

    def _active(self, tensor: Tensor) -> Tensor:
        block = self._block(tensor)
        return block if self.topology.is_dense else block[self.topology.indices.to(block.device)]

    def values(self) -> Tensor:
        """Active values, (nnz,)."""
        return self._active(self.owner.parameter).clone()

    def set_values(self, values: Tensor) -> None:
        """Replace the active values by `values` (nnz,)."""
        block = self._block(self.owner.parameter).clone()
        block[self.topology.indices.to(block.device)] = values.to(block)
        self.owner.parameter.detach()[self.rows] = block.view(self.shape)

    def grads(self) -> Tensor:
        """Gradients at the active entries, (nnz,)."""
        return self._active(self.owner.gradient())

    def grad_blocks(self) -> Iterator[tuple[int, Tensor]]:
        """The gradient at every position, in one block."""
        yield 0, self._block(self.owner.everywhere())

    def grads_at(self, positions: Tensor) -> Tensor:
        """The gradient at ascending flat `positions` (n,), (n,)."""
        block = self._block(self.owner.everywhere())
        return block[positions.to(block.device)]

    def rewire(self, topology: Topology) -> None:
        """Change the topology: survivors keep value and optimizer state, newcomers start at zero."""
        if topology == self.topology:
            return
        topology = topology.to(self.owner.parameter.device)
        old, mask = self.topology, topology.mask.to(self.owner.parameter.device)
        survivors = mask if old.is_dense else mask & old.mask.to(mask.device)
        forget_other_state(self.owner.optimizer, self.owner.parameter)
        state = weight_shaped_state(self.owner.optimizer, self.owner.parameter)
        moments = {key: self._starting_moment(s, topology) for key, s in state.items() if key in SECOND_MOMENTS}
        for tensor in (self.owner.parameter.detach(), *state.values()):
            zero_outside(tensor[self.rows], survivors.to(tensor.device))
        for key, (positions, moment) in moments.items():
            block = self._block(state[key]).clone()
            block[positions.to(block.device)] = moment
            state[key][self.rows] = block.view(self.shape)
        self.owner.write_mask(self.rows, mask)
        self.topology = topology

    def restore(self, topology: Topology) -> None:
        """Take on a saved topology without touching values or optimizer state."""
        self.topology = topology.to(self.owner.parameter.device)
        self.owner.write_mask(self.rows, self.topology.mask)

    def _starting_moment(self, moment: Tensor, topology: Topology) -> tuple[Tensor, Tensor]:
        """Newcomers' positions and the second moment they start with, both (n,)."""
        positions = topology.without(self.topology)
        grown = self._block(self.owner.everywhere())[positions.to(moment.device)] if self.owner.looked else None
        owner = self.owner
        return positions, starting_moment(
            owner.optimizer, owner.parameter, self._active(moment), grown, positions.numel()
        )
