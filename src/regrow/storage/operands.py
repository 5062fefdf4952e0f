"""The gradient at every position, kept as the operands whose product it is.

In the step of an update the inputs and output gradients of a layer are kept; growth reads the gradient from them in
blocks of rows, so that the whole is never formed.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from regrow import kernels
from regrow.core.topology import Topology
from regrow.storage.gradient import Gradient
from regrow.storage.memory import Memory


class KeptOperands:
    """What backward passes of one compressed parameter read, until the step of their update is closed.

    Args:
        gradient: of the parameter.
        memory: is asked before anything is kept.
    """

    def __init__(self, gradient: Gradient, memory: Memory) -> None:
        self.gradient = gradient
        self.memory = memory
        self._watched = False
        self._keeper = kernels.Keeper(self._claim)
        self._held: kernels.Keeper | None = None
        self._passes: list[int] = []
        """Which backward pass each of the kept operands belongs to; 0 once that pass is in the gradient."""
        self._seen: tuple[weakref.ref[Tensor], int] | None = None
        """The gradient that contains what was kept last, and its version."""
        self._largest: float | None = None
        """The largest entry of that gradient when it had accumulated; None where it is yet to be computed."""
        self._factor = 1.0
        """The factor by which the gradient was clipped or unscaled since."""
        memory.join(self)

    @property
    def key(self) -> int:
        """What a module is given so that its operators keep their operands here."""
        return self._keeper.key

    @property
    def is_held(self) -> bool:
        """Whether an update is still to come for which the operands outlive the next backward."""
        return self._held is not None

    @property
    def has_next(self) -> bool:
        """Whether operands of the next step are here already, beside those that are held."""
        return self.is_held and bool(self._keeper.kept)

    @property
    def _source(self) -> kernels.Keeper:
        return self._keeper if self._held is None else self._held

    @property
    def looked(self) -> bool:
        """Whether there is a gradient at every position for growth to look at, if only from other ranks."""
        return bool(self._source.kept) or (ranks() > 1 and (self._watched or self.is_held))

    @property
    def kept_bytes(self) -> int:
        """Bytes of inputs and output gradients that are kept."""
        return self._keeper.nbytes + (0 if self._held is None else self._held.nbytes)

    @property
    def watched(self) -> bool:
        """Whether the coming backward passes are to keep their operands here."""
        return self._watched

    def watch(self, everywhere: bool) -> None:
        """Whether the coming backward passes are to keep their operands here."""
        self._watched = everywhere

    def hold(self) -> None:
        """Keep what is here although the next backward may come before it is read."""
        if self._held is None:
            self._held = kernels.Keeper(self._claim)
            self._held.kept, self._keeper.kept = self._keeper.kept, []
            self._passes.clear()

    def forget(self) -> None:
        """Forget the held operands if there are any (those kept for the next step stay), or else the kept ones."""
        if self._held is not None:
            self._held = None
        else:
            self._keeper.kept.clear()
            self._passes.clear()
            self._seen, self._largest, self._factor = None, None, 1.0

    def forget_unfinished(self) -> None:
        """Forget passes that are in no gradient: broken off, discarded, or of `torch.autograd.grad`."""
        now = torch._C._current_graph_task_id()
        self._forget_discarded()
        self._retain(lambda key: key in (0, now))

    def arrived(self, grad: Tensor) -> None:
        """A backward has accumulated in `grad`: what was kept of it is in there now."""
        now = torch._C._current_graph_task_id()
        self._passes[:] = [0 if key == now else key for key in self._passes]
        self._seen = weakref.ref(grad), grad._version
        # Other ranks have a say in what the gradient will be.
        self._largest = largest(grad) if ranks() == 1 else None

    def settle(self, whole: Callable[[], Topology]) -> None:
        """Note by what the gradient was clipped or unscaled since it accumulated; forget everything if it is gone.

        Args:
            whole: gives the topology that the gradient has.
        """
        if self.is_held or not (self.looked or self._passes):
            return
        # Of a backward that is under way, the optimizer may step before the hook that sees the gradient.
        now = torch._C._current_graph_task_id()
        self._retain(lambda key: key in (0, now))
        grad = self.gradient.parameter.grad
        if grad is None:
            self.forget()
        elif now in self._passes:
            self._factor = 1.0
        elif self.looked:
            self._factor = self.multiple(grad, whole())

    def multiple(self, grad: Tensor, topology: Topology) -> float:
        """By what `grad` (capacity,) was clipped or unscaled since it accumulated with this `topology`."""
        if self._largest is None:
            self._largest = largest(self._sampled(topology, self._keeper))
        now = largest(grad)
        return now / self._largest if 0 < self._largest < math.inf and now < math.inf else 1.0

    def rows(self, low: int, high: int, size: int) -> Tensor:
        """Rows [low, high) of the gradient at every position, flat, of `size` entries each; the mean over ranks."""
        if self._source.kept:
            rows = self._source.rows(low, high, size, self.gradient.parameter.dtype).view(-1)
        else:
            rows = self.gradient.parameter.detach().new_zeros((high - low) * size)
        return _mean_over_ranks(rows).mul_(self._factor / self.gradient.scale)

    def at(self, topology: Topology) -> Tensor:
        """The gradient at the entries of a topology of the whole parameter, (nnz,); the mean over ranks."""
        return self._sampled(topology, self._source).mul_(self._factor / self.gradient.scale)

    def grow_early(self, grad: Tensor, newcomers: Tensor, positions: Topology, factor: float) -> None:
        """Give the gradient of the next step, which is here already, its values at newcomers.

        Args:
            grad: (nnz,), of the new topology.
            newcomers: which of its entries are new, bool (nnz,).
            positions: a topology of the newcomers alone.
            factor: by what the gradient was clipped or unscaled.
        """
        grad[newcomers] = self._sampled(positions, self._keeper).mul_(factor)
        self._largest = largest(grad) / factor if factor else 0.0

    def _sampled(self, topology: Topology, keeper: kernels.Keeper) -> Tensor:
        """The gradient at the entries of `topology` as it accumulated from what a keeper holds, (nnz,)."""
        total = self.gradient.parameter.detach().new_zeros(topology.nnz)
        groups = next((kept.geometry.groups for kept in keeper.kept if kept.geometry is not None), 1)
        if kernels.has_kernels(topology, groups):
            units = kernels.unit_index(topology)
            for operands in keeper.kept:
                total += kernels.sampled(operands, units).view(-1)
            return _mean_over_ranks(total)
        rows, order = (topology, None) if topology.is_unstructured else topology.by_entries()
        index = kernels.index(rows)
        for operands in keeper.kept:
            total += kernels.sampled(operands, index)
        return _mean_over_ranks(total if order is None else torch.empty_like(total).index_copy_(0, order, total))

    def _claim(self, more: int) -> None:
        """Before operands are kept: forget those of earlier passes, unless the gradient contains them."""
        now = torch._C._current_graph_task_id()
        del self._passes[len(self._keeper.kept) :]
        if now not in self._passes:
            self._forget_discarded()
        self.memory.claim(more)
        self._passes.append(now)

    def _forget_discarded(self) -> None:
        grad = self.gradient.parameter.grad
        if grad is not None and self._seen is not None and self._seen[0]() is grad and grad._version == self._seen[1]:
            return
        # Clipping and the mean over ranks write to a gradient, which goes on; one that is zero begins anew.
        if grad is None or not grad.any():
            self._retain(lambda key: key != 0)

    def _retain(self, wanted: Callable[[int], bool]) -> None:
        kept = [(key, operands) for key, operands in zip(self._passes, self._keeper.kept, strict=True) if wanted(key)]
        self._passes[:] = [key for key, _ in kept]
        self._keeper.kept[:] = [operands for _, operands in kept]


def largest(grad: Tensor) -> float:
    """The largest absolute value, 0 where there is none."""
    return float(grad.abs().max()) if grad.numel() else 0.0


def ranks() -> int:
    """Ranks over which gradients are averaged."""
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def _mean_over_ranks(gradient: Tensor) -> Tensor:
    if ranks() > 1:
        torch.distributed.all_reduce(gradient)
        gradient /= ranks()
    return gradient
