"""Compressed storage: only active values exist, in the weight, its gradient and the optimizer's state.

A weight costs 4 bytes per active entry (in float32) for each of value, gradient and optimizer state, and 12 for the
topology as the kernels read it. The gradient at inactive positions is never formed as a whole: in the step of an update
the inputs and output gradients of the layer are kept, and growth reads the gradient from them in blocks of rows.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from regrow import kernels
from regrow.core import selection
from regrow.core.draws import Stream
from regrow.core.topology import Topology
from regrow.nn import SparseModule, sparse_class
from regrow.nn.kinds import release, restore
from regrow.storage.state import (
    SECOND_MOMENTS,
    forget_other_state,
    preserves_zeros,
    starting_moment,
    weight_shaped_state,
)

REFUSED = frozenset({"Muon", "Adafactor", "LBFGS"})
"""Optimizers of torch.optim that read a weight's dense shape, or all parameters as one vector."""

_BLOCK = 1 << 20
"""Entries of the gradient that are formed at once."""

Holder = tuple[nn.Module, str]
"""A module and the name under which it holds a parameter."""


class CompressedParameter:
    """One parameter of which only active values exist, its modules, its optimizer and what growth may read.

    Until `materialize` the parameter is what it was, dense or on the meta device, and rewiring only notes topologies.

    Args:
        parameter: any float dtype; it keeps its identity.
        optimizer: the optimizer that steps it.
        names: canonical name of each equal block of leading rows; a single name for an ordinary weight.
        out_axis: which axis counts the outputs.
        in_axis: which axis counts the inputs.
        holders: every module that holds the parameter.
        allow: called with the bytes of inputs and output gradients about to be kept; raises where they are too many.

    Raises:
        ValueError: for a module without sparse form or an optimizer that cannot work on active values alone.
    """

    def __init__(
        self,
        parameter: nn.Parameter,
        optimizer: Optimizer,
        names: Sequence[str],
        out_axis: int,
        in_axis: int,
        holders: Sequence[Holder],
        allow: Callable[[int], None],
    ) -> None:
        _require_sparse_form(names[0], optimizer, holders)
        self.parameter = parameter
        self.optimizer = optimizer
        self.holders = list(holders)
        self.shape = tuple(parameter.shape)
        self.fresh = False
        self.reached = False
        self._materialized = False
        self._keep_dense = False
        self._keeper = kernels.Keeper(self._allow)
        self._held: kernels.Keeper | None = None
        self._budget = allow
        self._passes: list[int] = []
        """Which backward pass each of the kept operands belongs to; 0 once that pass is in the gradient."""
        self._seen: tuple[weakref.ref[Tensor], int] | None = None
        self._largest: float | None = None
        self._factor = 1.0
        self._scale = 1.0
        self._handle: torch.utils.hooks.RemovableHandle | None = None
        rows = self.shape[0] // len(names)
        self.weights = [
            CompressedWeight(self, name, (i * rows, (i + 1) * rows), out_axis, in_axis) for i, name in enumerate(names)
        ]

    @property
    def keep_dense(self) -> bool:
        """Whether the coming backward passes keep what the gradient at inactive positions is made of."""
        return self._keep_dense

    @keep_dense.setter
    def keep_dense(self, value: bool) -> None:
        self._keep_dense = value
        self._watch()

    @property
    def holding(self) -> bool:
        """Whether what was kept outlives the next backward, for an update that is still to come."""
        return self._held is not None

    @holding.setter
    def holding(self, value: bool) -> None:
        if not value:
            self._held = None
        elif self._held is None:
            self._held = kernels.Keeper(self._allow)
            self._held.kept, self._keeper.kept = self._keeper.kept, []
            self._passes.clear()

    @property
    def _source(self) -> kernels.Keeper:
        """Where growth reads: what is held for an update that is still to come, or else what was kept last."""
        return self._keeper if self._held is None else self._held

    def _watch(self) -> None:
        """Show the keeper to the modules while it is to see their backward passes."""
        if self._materialized:
            for module, name in self._sparse():
                if self._keep_dense:
                    module.keys[name] = self._keeper.key
                else:
                    module.keys.pop(name, None)

    def _sparse(self) -> Iterator[tuple[SparseModule, str]]:
        for module, name in self.holders:
            assert isinstance(module, SparseModule)
            yield module, name

    @property
    def whole(self) -> Topology:
        """The topology of all blocks, sharing memory with the index of the kernels."""
        if not self._materialized:
            return Topology.stack([w.noted for w in self.weights])
        module, name = next(self._sparse())
        return module.topology(name)

    # Becoming sparse

    def require_free(self) -> None:
        """Raise ValueError when the parameter cannot change its memory, since something still refers to it."""
        self._let_go()
        weak = len(weakref.getweakrefs(self.parameter))
        strong = self.parameter._use_count() - 1  # type: ignore[attr-defined]
        for module, _ in self.holders:
            restore(module)
        if weak or strong:
            raise ValueError(
                f"{self.weights[0].name} cannot become compressed while something else refers to it ({strong} graphs "
                f"or tensors, {weak} weak references): call regrow.sparsify before the first forward pass and before "
                "DistributedDataParallel, or delete that pass's outputs"
            )

    def _let_go(self) -> None:
        """Let modules drop the references that they keep of the parameter, which forbid an exchange."""
        for module, _ in self.holders:
            release(module)

    def materialize(self, room: int, seed: int) -> None:
        """Give the parameter memory for its active values only, and its modules their sparse form.

        Args:
            room: the most entries that the parameter will ever hold; at least as many as it holds are made room for.
            seed: of the values, where the parameter lies on the meta device.
        """
        topology = Topology.stack([w.noted for w in self.weights])
        capacity = max(room, topology.nnz)
        held = weight_shaped_state(self.optimizer, self.parameter)
        forget_other_state(self.optimizer, self.parameter)
        state = {key: _gathered(tensor, topology, capacity) for key, tensor in held.items()}
        dense, grad = self.parameter.detach(), self.parameter.grad
        blank = torch.empty(0, dtype=dense.dtype)
        fresh = nn.Parameter(
            blank if dense.is_meta else _gathered(dense, topology, capacity), self.parameter.requires_grad
        )
        self._let_go()
        exchange(self.parameter, fresh)
        self.optimizer.state.get(self.parameter, {}).update(state)
        if grad is not None and not grad.is_meta:
            self.parameter.grad = _gathered(grad, topology, capacity)
        for module, name in self.holders:
            if not isinstance(module, SparseModule):
                cls = sparse_class(module)
                assert cls is not None
                cls.adopt(module, {})
            assert isinstance(module, SparseModule)
            if dense.is_meta and self.parameter.numel() < capacity:
                drawn = module.initial(name)(Stream(seed, self.weights[0].name, -1), topology.nnz)
                values = drawn.new_zeros(capacity)
                values[: topology.nnz] = drawn
                self.parameter.data = values.to(dense.dtype)
            module.hold(name, self.parameter, topology)
        self._materialized = True
        for weight in self.weights:
            weight.noted = Topology(weight.shape)
        self._watch()
        accumulated = weakref.WeakMethod(self._accumulated)

        def hook(parameter: Tensor) -> None:
            """Weak, since the garbage collector does not see through a tensor's hooks."""
            if (call := accumulated()) is not None:
                call(parameter)

        self._handle = self.parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]

    def remove(self) -> None:
        """Detach from the parameter, which stays compressed and trains with the topology that it has."""
        self.keep_dense = False
        if self._handle is not None:
            self._handle.remove()

    # Gradients

    def _allow(self, more: int) -> None:
        """Before operands are kept: forget those of earlier passes, unless the gradient contains them."""
        now = torch._C._current_graph_task_id()
        del self._passes[len(self._keeper.kept) :]
        if now not in self._passes:
            self._forget_discarded()
        self._budget(more)
        self._passes.append(now)

    def _forget_discarded(self) -> None:
        grad = self.parameter.grad
        if grad is not None and self._seen is not None and self._seen[0]() is grad and grad._version == self._seen[1]:
            return
        # Clipping and the mean over ranks write to a gradient, which goes on; one that is zero begins anew.
        if grad is None or not grad.any():
            self._retain(lambda key: key != 0)

    def forget_unfinished(self) -> None:
        """Forget what is kept of passes that are in no gradient: broken off, discarded, or by `torch.autograd.grad`."""
        now = torch._C._current_graph_task_id()
        self._forget_discarded()
        self._retain(lambda key: key in (0, now))

    def _retain(self, wanted: Callable[[int], bool]) -> None:
        kept = [(key, operands) for key, operands in zip(self._passes, self._keeper.kept, strict=True) if wanted(key)]
        self._passes[:] = [key for key, _ in kept]
        self._keeper.kept[:] = [operands for _, operands in kept]

    def _accumulated(self, parameter: Tensor) -> None:
        """After each backward: what was kept of it is in the gradient now."""
        grad = parameter.grad
        if grad is None:
            return
        self.fresh = self.reached = True
        if not self._keep_dense:
            return
        now = torch._C._current_graph_task_id()
        self._passes[:] = [0 if key == now else key for key in self._passes]
        self._seen = weakref.ref(grad), grad._version
        # Other ranks have a say in what the gradient will be.
        self._largest = _largest(grad) if _ranks() == 1 else None

    def mask_gradient(self) -> None:
        """Zero the inert tail of the gradient."""
        grad = self.parameter.grad
        if grad is not None and self._materialized:
            grad[self.nnz :] = 0

    def settle(self) -> None:
        """Make what was kept agree with the parameter's gradient: as much clipped or unscaled, or forgotten."""
        if self.holding:
            return
        self._retain(lambda key: key == 0)
        grad = self.parameter.grad
        if grad is None:
            self._forget()
        if grad is None or not self.looked:
            return
        self._factor = self._multiple(grad, self.whole)

    def _multiple(self, grad: Tensor, topology: Topology) -> float:
        """By what the gradient was clipped or unscaled since it was accumulated, with the topology that it has."""
        if self._largest is None:
            self._largest = _largest(self._sampled(topology, self._keeper))
        now = _largest(grad)
        return now / self._largest if 0 < self._largest < math.inf and now < math.inf else 1.0

    def _forget(self) -> None:
        self._keeper.kept.clear()
        self._passes.clear()
        self._seen, self._largest, self._factor = None, None, 1.0

    def set_aside(self) -> None:
        """Nothing is to be done: what growth reads lies in the keeper, apart from the gradient."""
        self.settle()

    def release(self) -> None:
        """Forget what was kept; or only what was held, while that of the next step is there already."""
        if self.holding:
            self.holding = False
        else:
            self._forget()
        self._scale = 1.0

    def use_scale(self, scale: float) -> None:
        """Divide by `scale` whatever gradients are read: a fused optimizer's step begins with scaled ones."""
        self._scale = scale

    @property
    def kept_bytes(self) -> int:
        """Bytes of inputs and output gradients that are kept."""
        return self._keeper.nbytes + (0 if self._held is None else self._held.nbytes)

    @property
    def looked(self) -> bool:
        """Whether there is a gradient at every position for growth to look at, if only from other ranks."""
        return bool(self._source.kept) or (_ranks() > 1 and self._materialized and (self._keep_dense or self.holding))

    def require_finite_gradient(self) -> None:
        """Raise ValueError when the gradient at the active entries is not finite; growth checks the others."""
        grad = self.parameter.grad
        if grad is not None and not selection.is_finite(grad):
            bad = int((~grad.isfinite()).sum())
            raise ValueError(
                f"{self.weights[0].name}: {bad:,} of {grad.numel():,} gradients are not finite at an update: lower the "
                "learning rate, or skip such steps with a gradient scaler"
            )

    def gradient(self) -> Tensor:
        """The gradient, (capacity,), or of the dense shape before `materialize`.

        Raises:
            ValueError: when no backward reached the parameter.
        """
        grad = self.parameter.grad
        if grad is None:
            name = self.weights[0].name
            raise ValueError(f"{name} has no gradient: call loss.backward() before optimizer.step()")
        return grad if self._scale == 1 else grad / self._scale

    def gradient_rows(self, low: int, high: int) -> Tensor:
        """Rows [low, high) of the gradient at every position, flat; the mean over ranks.

        Raises:
            ValueError: when what it is made of was not kept, as the method did not declare that it needs it.
        """
        if not self._materialized:
            return self.gradient().detach()[low:high].reshape(-1)
        self._require_kept()
        size = math.prod(self.shape[1:])
        if self._source.kept:
            rows = self._source.rows(low, high, size, self.parameter.dtype).view(-1)
        else:
            rows = self.parameter.detach().new_zeros((high - low) * size)
        return self._mean(rows).mul_(self._factor / self._scale)

    def gradient_at(self, topology: Topology) -> Tensor:
        """The gradient at the entries of a topology of the whole parameter, (nnz,); the mean over ranks.

        Raises:
            ValueError: when what it is made of was not kept, as the method did not declare that it needs it.
        """
        self._require_kept()
        return self._sampled(topology, self._source).mul_(self._factor / self._scale)

    def _require_kept(self) -> None:
        if not self.looked:
            raise ValueError(
                f"{self.weights[0].name}: the gradient at inactive positions is not kept here: declare it in the "
                "method's needs (Need.GRADIENT or Need.EVERY_GRADIENT)"
            )

    def _sampled(self, topology: Topology, keeper: kernels.Keeper) -> Tensor:
        """As `gradient_at`, of the gradient as it was accumulated from what a keeper holds."""
        index = kernels.index(topology)
        total = self.parameter.detach().new_zeros(topology.nnz)
        for operands in keeper.kept:
            total += kernels.sampled(operands, index)
        return self._mean(total)

    def _mean(self, gradient: Tensor) -> Tensor:
        if _ranks() > 1:
            torch.distributed.all_reduce(gradient)
            gradient /= _ranks()
        return gradient

    # Values and state

    @property
    def nnz(self) -> int:
        """Active entries of all blocks."""
        module, name = next(self._sparse())
        return module.index(name).nnz

    def project(self) -> None:
        """Zero the inert tail, whoever wrote to it."""
        if self._materialized:
            self.parameter.detach()[self.nnz :] = 0

    def project_state(self) -> None:
        """Zero the inert tail of the optimizer's state."""
        if self._materialized:
            for state in weight_shaped_state(self.optimizer, self.parameter).values():
                state[self.nnz :] = 0

    def stepping(self, step: int) -> None:
        """Nothing to do: the optimizer steps the values that the model holds."""

    def stepped(self) -> None:
        """Project after the optimizer's step, unless it is known to leave zeros at zero."""
        if self.parameter.numel() > self.nnz and not preserves_zeros(self.optimizer, self.parameter):
            self.project()
            self.project_state()

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
        grad = self.parameter.grad
        # Of the next step, where this update waited for an optimizer that did not step.
        early = self._multiple(grad, old) if grad is not None and self.holding and self._keeper.kept else None
        for tensor in (self.parameter.detach(), *state.values(), *(() if grad is None else (grad,))):
            if old.nnz:
                tensor[: new.nnz] = torch.where(newcomers, gone.to(tensor), tensor.index_select(0, source))
            tensor[new.nnz :] = 0
        for key, moment in moments.items():
            state[key][: new.nnz][newcomers] = moment
        if grad is not None and early is not None:
            grad[: new.nnz][newcomers] = self._sampled(Topology(new.shape, new.without(old)), self._keeper).mul_(early)
            self._largest = _largest(grad) / early if early else 0.0
        del source, newcomers
        for module, name in self._sparse():
            module.rewire(name, new)

    def _moments(self, moment: Tensor, old: Topology, new: Topology) -> Tensor:
        """The second moments that newcomers start with, in their order."""
        grown = self.gradient_at(Topology(new.shape, new.without(old))) if self.looked else None
        parts, first = [], 0
        for weight in self.weights:
            before, after = old.block(*weight.rows), new.block(*weight.rows)
            begin, count = int(old.starts[weight.rows[0]]), after.without(before).numel()
            active = moment[begin : begin + before.nnz]
            here = None if grown is None else grown[first : first + count]
            parts.append(starting_moment(self.optimizer, self.parameter, active, here, count))
            first += count
        return torch.cat(parts)


class CompressedWeight:
    """A `SparseWeight` over a block of rows of a compressed parameter."""

    def __init__(
        self, owner: CompressedParameter, name: str, rows: tuple[int, int], out_axis: int, in_axis: int
    ) -> None:
        self.owner = owner
        self.name = name
        self.rows = rows
        self.out_axis = out_axis
        self.in_axis = in_axis
        self.shape = (rows[1] - rows[0], *owner.shape[1:])
        self.noted = Topology(self.shape)
        """The topology until the parameter becomes compressed."""
        self.generator = Stream(0, name, 0)
        self.state: dict[str, Tensor] = {}

    @property
    def topology(self) -> Topology:
        """What is active."""
        return self.owner.whole.block(*self.rows) if self.owner._materialized else self.noted

    @property
    def has_grad(self) -> bool:
        """Whether the last backward reached this weight; a gradient that someone zeroed or wrote is looked at."""
        grad = self.owner.parameter.grad
        return grad is not None and (self.owner.reached or bool(grad.any()))

    def _active(self, tensor: Tensor) -> Tensor:
        """This weight's part of a tensor that is shaped like the parameter, (nnz,): a view where memory allows."""
        if not self.owner._materialized:
            block = tensor[slice(*self.rows)].reshape(-1)
            return block if self.noted.is_dense else block[self.noted.indices.to(block.device)]
        starts = self.owner.whole.starts
        return tensor[int(starts[self.rows[0]]) : int(starts[self.rows[1]])]

    def values(self) -> Tensor:
        """Active values, (nnz,)."""
        return self._active(self.owner.parameter.detach()).clone()

    def set_values(self, values: Tensor) -> None:
        """Replace the active values by `values` (nnz,)."""
        if self.owner._materialized:
            self._active(self.owner.parameter.detach()).copy_(values)
            return
        block = self.owner.parameter.detach()[slice(*self.rows)]
        flat = block.reshape(-1).clone()
        flat[self.noted.indices.to(flat.device)] = values.to(flat)
        block.copy_(flat.view(block.shape))

    def grads(self) -> Tensor:
        """Gradients at the active entries, (nnz,)."""
        return self._active(self.owner.gradient())

    def grad_blocks(self) -> Iterator[tuple[int, Tensor]]:
        """The gradient at every position, in blocks of whole rows."""
        low, high = self.rows
        size = max(1, math.prod(self.shape[1:]))
        step = max(1, _BLOCK // size)
        for row in range(low, high, step):
            yield (row - low) * size, self.owner.gradient_rows(row, min(high, row + step))

    def grads_at(self, positions: Tensor) -> Tensor:
        """The gradient at ascending flat `positions` (n,), (n,)."""
        low, high = self.rows
        if not self.owner._materialized:
            return self.owner.gradient_rows(low, high)[positions]
        first = low * math.prod(self.shape[1:])
        return self.owner.gradient_at(Topology(self.owner.shape, positions + first))

    def rewire(self, topology: Topology) -> None:
        """Change the topology: survivors keep value and optimizer state, newcomers start at zero."""
        if topology == self.topology:
            return
        if not self.owner._materialized:
            if not self.noted.is_dense:
                self._blank(topology.without(self.noted))
            self.noted = topology
            return
        self.owner.rewire(self._whole_with(topology))

    def _blank(self, newcomers: Tensor) -> None:
        """What comes back before `materialize`: its value is still there, and must be zero."""
        owner = self.owner
        if newcomers.numel() == 0 or owner.parameter.is_meta:
            return
        state = weight_shaped_state(owner.optimizer, owner.parameter)
        for key, tensor in {"": owner.parameter.detach(), **state}.items():
            block = tensor[slice(*self.rows)]
            flat = block.reshape(-1).clone()
            flat[newcomers.to(flat.device)] = 0
            if key in SECOND_MOMENTS:
                flat[newcomers.to(flat.device)] = starting_moment(
                    owner.optimizer, owner.parameter, self._active(tensor), None, newcomers.numel()
                )
            block.copy_(flat.view(block.shape))

    def restore(self, topology: Topology) -> None:
        """Take on a saved topology without touching values or optimizer state."""
        if not self.owner._materialized:
            self.noted = topology
            return
        whole = self._whole_with(topology)
        for module, name in self.owner._sparse():
            module.rewire(name, whole)

    def _whole_with(self, topology: Topology) -> Topology:
        """The topology of the whole parameter, with this block's replaced."""
        return Topology.stack([topology if w is self else w.topology for w in self.owner.weights])


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


def _largest(grad: Tensor) -> float:
    return float(grad.abs().max()) if grad.numel() else 0.0


def _ranks() -> int:
    """Ranks over which gradients are averaged."""
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
