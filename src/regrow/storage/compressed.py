"""Compressed storage: only active values exist, in the weight, its gradient and the optimizer's state.

A weight costs 4 bytes per active entry (in float32) for each of value, gradient and optimizer state, and 12 for the
topology as the kernels read it. The gradient at inactive positions is never formed as a whole: growth reads it in
blocks of rows from the operands that the step of an update keeps.

A parameter is pending until its first topology is known: it is then still what it was, dense or on the meta device.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from regrow.core.draws import Stream
from regrow.core.topology import Topology
from regrow.nn import SparseModule, sparse_class
from regrow.nn.kinds import release, restore
from regrow.storage.gradient import Gradient
from regrow.storage.memory import Memory
from regrow.storage.operands import KeptOperands
from regrow.storage.state import (
    SECOND_MOMENTS,
    forget_other_state,
    preserves_zeros,
    starting_moment,
    weight_shaped_state,
)
from regrow.storage.stored import Draft, Stored

REFUSED = frozenset({"Muon", "Adafactor", "LBFGS"})
"""Optimizers of torch.optim that read a weight's dense shape, or all parameters as one vector."""

_BLOCK = 1 << 20
"""Entries of the gradient that are formed at once."""

Holder = tuple[nn.Module, str]
"""A module and the name under which it holds a parameter."""


class PendingParameter(Draft):
    """One parameter that is to be compressed; rewiring its weights only notes their topologies.

    Args:
        parameter: any float dtype; it keeps its identity.
        optimizer: the optimizer that steps it.
        names: canonical name of each equal block of leading rows; a single name for an ordinary weight.
        out_axis: which axis counts the outputs.
        in_axis: which axis counts the inputs.
        holders: every module that holds the parameter.
        memory: is asked before operands are kept for an update.

    Raises:
        ValueError: for a module without sparse form or an optimizer that cannot work on active values alone.
    """

    storage = "compressed"

    def __init__(
        self,
        parameter: nn.Parameter,
        optimizer: Optimizer,
        names: Sequence[str],
        out_axis: int,
        in_axis: int,
        holders: Sequence[Holder],
        memory: Memory,
    ) -> None:
        _require_sparse_form(names[0], optimizer, holders)
        self.parameter = parameter
        self.optimizer = optimizer
        self.gradient = Gradient(parameter, names[0])
        self.holders = list(holders)
        self.memory = memory
        rows = parameter.shape[0] // len(names)
        self._weights = [
            PendingWeight(self, name, slice(i * rows, (i + 1) * rows), out_axis, in_axis)
            for i, name in enumerate(names)
        ]

    @property
    def weights(self) -> Sequence[PendingWeight]:
        """The weights that it holds."""
        return self._weights

    @property
    def whole(self) -> Topology:
        """The topology of all blocks."""
        return Topology.stack([w.topology for w in self._weights])

    def require_free(self) -> None:
        """Raise ValueError when the parameter cannot change its memory, since something still refers to it."""
        self._let_go()
        weak = len(weakref.getweakrefs(self.parameter))
        strong = self.parameter._use_count() - 1  # type: ignore[attr-defined]
        for module, _ in self.holders:
            restore(module)
        if weak or strong:
            raise ValueError(
                f"{self.gradient.name} cannot become compressed while something else refers to it ({strong} graphs "
                f"or tensors, {weak} weak references): call regrow.sparsify before the first forward pass and before "
                "DistributedDataParallel, or delete that pass's outputs"
            )

    def _let_go(self) -> None:
        """Let modules drop the references that they keep of the parameter, which forbid an exchange."""
        for module, _ in self.holders:
            release(module)

    def become(self, room: int, seed: int) -> CompressedParameter:
        """Give the parameter memory for its active values only, and its modules their sparse form.

        Args:
            room: the most entries that the parameter will ever hold; at least as many as it holds are made room for.
            seed: of the values, where the parameter lies on the meta device.
        """
        topology = self.whole
        capacity = max(room, topology.nnz)
        held = weight_shaped_state(self.optimizer, self.parameter)
        forget_other_state(self.optimizer, self.parameter)
        state = {key: _gathered(tensor, topology, capacity) for key, tensor in held.items()}
        dense, grad = self.parameter.detach(), self.parameter.grad
        values = self._drawn(topology, capacity, seed) if dense.is_meta else _gathered(dense, topology, capacity)
        self._let_go()
        exchange(self.parameter, nn.Parameter(values, self.parameter.requires_grad))
        self.optimizer.state.get(self.parameter, {}).update(state)
        if grad is not None and not grad.is_meta:
            self.parameter.grad = _gathered(grad, topology, capacity)
        for module, name in self.holders:
            _sparse(module).hold(name, self.parameter, topology)
        return CompressedParameter(self, dense.shape)

    def _drawn(self, topology: Topology, capacity: int, seed: int) -> Tensor:
        """Values as the module draws them, (capacity,), for a parameter that has none."""
        module, name = self.holders[0]
        drawn = _sparse(module).initial(name)(Stream(seed, self.gradient.name, -1), topology.nnz)
        values = drawn.new_zeros(capacity)
        values[: topology.nnz] = drawn
        return values.to(self.parameter.dtype)


class PendingWeight:
    """A `SparseWeight` over a block of rows of a parameter that is to be compressed."""

    def __init__(self, owner: PendingParameter, name: str, rows: slice, out_axis: int, in_axis: int) -> None:
        self.owner = owner
        self.name = name
        self.rows = rows
        self.out_axis = out_axis
        self.in_axis = in_axis
        self.shape = (rows.stop - rows.start, *owner.parameter.shape[1:])
        self.topology = Topology(self.shape)
        self.generator = Stream(0, name, 0)
        self.state: dict[str, Tensor] = {}

    @property
    def has_grad(self) -> bool:
        """Whether there is a gradient."""
        return self.owner.gradient.reached

    def _block(self, tensor: Tensor) -> Tensor:
        """This weight's rows of a tensor of the parameter's shape, (numel,): a view where memory allows."""
        return tensor.detach()[self.rows].reshape(-1)

    def _active(self, tensor: Tensor) -> Tensor:
        block = self._block(tensor)
        return block if self.topology.is_dense else block[self.topology.indices.to(block.device)]

    def _write(self, tensor: Tensor, positions: Tensor, values: Tensor | float) -> None:
        """Write `values` (n,) to flat `positions` (n,) of this weight's rows of a tensor of the parameter's shape."""
        block = self._block(tensor).clone()
        block[positions.to(block.device)] = values.to(block) if isinstance(values, Tensor) else values
        tensor.detach()[self.rows] = block.view(self.shape)

    def values(self) -> Tensor:
        """Active values, (nnz,)."""
        return self._active(self.owner.parameter).clone()

    def set_values(self, values: Tensor) -> None:
        """Replace the active values by `values` (nnz,)."""
        self._write(self.owner.parameter, self.topology.indices, values)

    def grads(self) -> Tensor:
        """Gradients at the active entries, (nnz,)."""
        return self._active(self.owner.gradient.read())

    def grad_blocks(self) -> Iterator[tuple[int, Tensor]]:
        """The gradient at every position, in one block."""
        yield 0, self._block(self.owner.gradient.read())

    def grads_at(self, positions: Tensor) -> Tensor:
        """The gradient at ascending flat `positions` (n,), (n,)."""
        block = self._block(self.owner.gradient.read())
        return block[positions.to(block.device)]

    def rewire(self, topology: Topology) -> None:
        """Note the topology; what comes back starts at zero, although its value is still there."""
        owner = self.owner
        # Nothing comes back to what is whole, and to look for it would cost as much as the dense weight.
        newcomers = None if self.topology.is_dense else topology.without(self.topology)
        if newcomers is not None and newcomers.numel() and not owner.parameter.is_meta:
            state = weight_shaped_state(owner.optimizer, owner.parameter)
            moments = {
                key: starting_moment(owner.optimizer, owner.parameter, self._active(s), None, newcomers.numel())
                for key, s in state.items()
                if key in SECOND_MOMENTS
            }
            self._write(owner.parameter, newcomers, 0.0)
            for key, tensor in state.items():
                self._write(tensor, newcomers, moments.get(key, 0.0))
        self.topology = topology

    def restore(self, topology: Topology) -> None:
        """Note a saved topology."""
        self.topology = topology


class CompressedParameter(Stored):
    """One parameter of which only active values exist, its modules, its optimizer and what growth may read.

    Args:
        pending: what it was before; its modules hold the parameter in their sparse form already.
        shape: the dense shape.
    """

    storage = "compressed"

    def __init__(self, pending: PendingParameter, shape: Sequence[int]) -> None:
        self.parameter = pending.parameter
        self.optimizer = pending.optimizer
        self.gradient = pending.gradient
        self.shape = tuple(shape)
        self.holders = [(_sparse(module), name) for module, name in pending.holders]
        self.operands = KeptOperands(self.gradient, pending.memory)
        self._weights = [CompressedWeight(self, weight) for weight in pending.weights]
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
        """Forget what was kept; where an update was waiting, only what was held for it."""
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

    def rewire(self, new: Topology) -> None:
        """Change the topology of the whole parameter, carrying values, gradient and state of the survivors."""
        forget_other_state(self.optimizer, self.parameter)
        old = self.whole
        source = new.ranks_in(old)
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
            positions = Topology(new.shape, new.without(old))
            self.operands.grow_early(grad[: new.nnz], newcomers, positions, early)
        del source, newcomers
        self.restore(new)

    def restore(self, topology: Topology) -> None:
        """Take on a topology of the whole parameter, leaving values where they are."""
        for module, name in self.holders:
            module.rewire(name, topology)

    def _moments(self, moment: Tensor, old: Topology, new: Topology) -> Tensor:
        """The second moments that newcomers start with, in their order."""
        grown = self.operands.at(Topology(new.shape, new.without(old))) if self.looked else None
        parts, first = [], 0
        for weight in self._weights:
            before, after = old.block(*weight.rows), new.block(*weight.rows)
            begin, count = int(old.starts[weight.rows[0]]), after.without(before).numel()
            active = moment[begin : begin + before.nnz]
            here = None if grown is None else grown[first : first + count]
            parts.append(starting_moment(self.optimizer, self.parameter, active, here, count))
            first += count
        return torch.cat(parts)


class CompressedWeight:
    """A `SparseWeight` over a block of rows of a compressed parameter."""

    def __init__(self, owner: CompressedParameter, pending: PendingWeight) -> None:
        self.owner = owner
        self.name = pending.name
        self.rows = pending.rows.start, pending.rows.stop
        self.out_axis = pending.out_axis
        self.in_axis = pending.in_axis
        self.shape = pending.shape
        self.generator = pending.generator
        self.state = pending.state

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
        starts = self.owner.whole.starts
        return tensor.detach()[int(starts[self.rows[0]]) : int(starts[self.rows[1]])]

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
        """The gradient at every position, in blocks of whole rows."""
        kept, (low, high) = self.owner.kept(), self.rows
        size = max(1, math.prod(self.shape[1:]))
        step = max(1, _BLOCK // size)
        for row in range(low, high, step):
            yield (row - low) * size, kept.rows(row, min(high, row + step), math.prod(self.shape[1:]))

    def grads_at(self, positions: Tensor) -> Tensor:
        """The gradient at ascending flat `positions` (n,), (n,)."""
        first = self.rows[0] * math.prod(self.shape[1:])
        return self.owner.kept().at(Topology(self.owner.shape, positions + first))

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


def _sparse(module: nn.Module) -> SparseModule:
    """The module in its sparse form, which it takes on if it has not yet."""
    if not isinstance(module, SparseModule):
        cls = sparse_class(module)
        assert cls is not None
        cls.adopt(module, {})
    assert isinstance(module, SparseModule)
    return module


def _require_sparse_form(name: str, optimizer: Optimizer, holders: Sequence[Holder]) -> None:
    for module, _ in holders:
        if not isinstance(module, SparseModule) and sparse_class(module) is None:
            raise ValueError(
                f"{name} belongs to a {type(module).__name__}, of which there is no sparse form: name it in skip=, or "
                'use storage="masked" or storage="auto"'
            )
    if is_refused(optimizer):
        raise ValueError(
            f"{type(optimizer).__name__} cannot step {name} compressed, since it is no element-wise optimizer: use "
            'SGD, Adam or another element-wise one for it, or storage="masked"'
        )
    if any(torch.is_tensor(s) and s.is_meta for state in optimizer.state.values() for s in state.values()):
        raise ValueError(
            f"{type(optimizer).__name__} began with state on the meta device, whose values are lost: build the model "
            "on a real device, or use an optimizer that makes its state in its first step"
        )


def is_refused(optimizer: Optimizer) -> bool:
    """Whether an optimizer, or one that it derives from, cannot work on active values alone."""
    return any(base.__name__ in REFUSED for base in type(optimizer).__mro__)


def exchange(one: Tensor, other: Tensor) -> None:
    """Exchange memory and shape of two tensors; `one` keeps its identity, its attributes and its hooks."""
    attributes = dict(vars(one))
    torch.utils.swap_tensors(one, other)  # type: ignore[no-untyped-call]
    vars(one).update(attributes)
    # Half of a hook lies in what was exchanged; naming it anew puts it there again.
    one._backward_hooks = one._backward_hooks
    one._post_accumulate_grad_hooks = one._post_accumulate_grad_hooks


def _gathered(dense: Tensor, topology: Topology, capacity: int) -> Tensor:
    """The active entries of a dense tensor and zeros, (capacity,)."""
    values = dense.new_zeros(capacity)
    flat = dense.detach().reshape(-1)
    values[: topology.nnz] = flat if topology.is_dense else flat[topology.indices.to(flat.device)]
    return values
