"""A parameter that is to be compressed, until its first topology is known.

It is still what it was, dense or on the meta device, and rewiring only notes topologies.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from regrow.core.draws import Stream
from regrow.core.topology import Topology
from regrow.nn import SparseModule, sparse_class
from regrow.nn.kinds import release, restore
from regrow.storage.behaviour import behaviour_of
from regrow.storage.compressed import CompressedParameter
from regrow.storage.gradient import Gradient
from regrow.storage.memory import Memory
from regrow.storage.rows import DenseRows, blocks_of
from regrow.storage.state import (
    SECOND_MOMENTS,
    starting_moment,
    weight_shaped_state,
)
from regrow.storage.stored import Draft

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
        self._weights = [PendingWeight(self, *block, out_axis, in_axis) for block in blocks_of(parameter, names)]

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
        state = {key: _gathered(tensor, topology, capacity) for key, tensor in held.items()}
        dense, grad = self.parameter.detach(), self.parameter.grad
        values = self._drawn(topology, capacity, seed) if dense.is_meta else _gathered(dense, topology, capacity)
        self._let_go()
        swap_memory(self.parameter, nn.Parameter(values, self.parameter.requires_grad))
        self.optimizer.state.get(self.parameter, {}).update(state)
        if grad is not None and not grad.is_meta:
            self.parameter.grad = _gathered(grad, topology, capacity)
        holders = [(_sparse(module), name) for module, name in self.holders]
        for module, name in holders:
            module.hold(name, self.parameter, topology)
        return CompressedParameter(self, holders, dense.shape, self.memory)

    def _drawn(self, topology: Topology, capacity: int, seed: int) -> Tensor:
        """Values as the module draws them, (capacity,), for a parameter that has none."""
        module, name = self.holders[0]
        drawn = _sparse(module).initial(name)(Stream(seed, self.gradient.name, -1), topology.nnz)
        values = drawn.new_zeros(capacity)
        values[: topology.nnz] = drawn
        return values.to(self.parameter.dtype)


class PendingWeight(DenseRows):
    """A `SparseWeight` over a block of rows of a parameter that is to be compressed."""

    owner: PendingParameter

    def rewire(self, topology: Topology) -> None:
        """Note the topology; what comes back starts at zero, although its value is still there."""
        owner = self.owner
        # Nothing comes back to what is whole, and to look for it would cost as much as the dense weight.
        newcomers = None if self.topology.is_dense else topology.entries_of(topology.without(self.topology))
        if newcomers is not None and newcomers.numel() and not owner.parameter.is_meta:
            state = weight_shaped_state(owner.optimizer, owner.parameter)
            moments = {
                key: starting_moment(
                    owner.optimizer, owner.parameter, self.active(self.block(s)), None, newcomers.numel()
                )
                for key, s in state.items()
                if key in SECOND_MOMENTS
            }
            self.write(owner.parameter, newcomers, 0.0)
            for key, tensor in state.items():
                self.write(tensor, newcomers, moments.get(key, 0.0))
        self.topology = topology

    def restore(self, topology: Topology) -> None:
        """Note a saved topology."""
        self.topology = topology


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
    behaviour = behaviour_of(optimizer)
    if not behaviour.alone:
        raise ValueError(
            f"{type(optimizer).__name__} cannot step {name} compressed, since it {behaviour.why}: use SGD, Adam or "
            'another element-wise one for it, or storage="masked"'
        )
    if any(torch.is_tensor(s) and s.is_meta for state in optimizer.state.values() for s in state.values()):
        raise ValueError(
            f"{type(optimizer).__name__} began with state on the meta device, whose values are lost: build the model "
            "on a real device, or use an optimizer that makes its state in its first step"
        )


def swap_memory(one: Tensor, other: Tensor) -> None:
    """Exchange memory and shape of two tensors; `one` keeps its identity, its attributes and its hooks."""
    attributes = dict(vars(one))
    torch.utils.swap_tensors(one, other)  # type: ignore[no-untyped-call]
    vars(one).update(attributes)
    # The C++ half of a hook went with the memory; assigning the Python half registers it again.
    one._backward_hooks = one._backward_hooks
    one._post_accumulate_grad_hooks = one._post_accumulate_grad_hooks


def _gathered(dense: Tensor, topology: Topology, capacity: int) -> Tensor:
    """The active entries of a dense tensor and zeros, (capacity,)."""
    values = dense.new_zeros(capacity)
    flat = dense.detach().reshape(-1)
    whole = topology.is_dense and topology.is_unstructured
    values[: topology.nnz] = flat if whole else flat[topology.entries.to(flat.device)]
    return values
