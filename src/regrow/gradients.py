"""Gradients over several batches, leaving no trace in the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from regrow.topology import Topology

Loss = Callable[[nn.Module, Any], Tensor]
"""(model, batch) -> scalar loss."""


@contextmanager
def mean_gradient(
    model: nn.Module, parameters: Sequence[nn.Parameter], batches: Iterable[Any], loss: Loss
) -> Iterator[None]:
    """Within the context `grad` of `parameters` is the mean over `batches` of the gradient of `loss`.

    Afterwards all gradients, all buffers (running statistics of batch norm) and the random state are as before.

    Raises:
        ValueError: when `batches` is empty, or a part of the model has no values to take a gradient at.
    """
    _require_values(model)
    buffers = [(m, name, b, b.detach().clone()) for m in model.modules() for name, b in m.named_buffers(recurse=False)]
    grads = [(p, p.grad) for p in model.parameters()]
    for parameter, _ in grads:
        parameter.grad = None
    try:
        with torch.random.fork_rng(), torch.enable_grad():
            count = 0
            for batch in batches:
                loss(model, batch).backward()  # type: ignore[no-untyped-call]
                count += 1
        if not count:
            raise ValueError("batches= is empty: give at least one batch")
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.div_(count)
        yield
    finally:
        for module, name, buffer, values in buffers:
            setattr(module, name, buffer.copy_(values))
        for parameter, grad in grads:
            parameter.grad = grad


class BatchProbe:
    """A `Probe` over `batches`, which is iterated anew at every question.

    Args:
        model: left as it was by every question.
        parameters: each sparsified parameter with the number of equal blocks of leading rows that are its weights.
        batches: data, such as a list or a `DataLoader`; no iterator, which could be read only once.
        loss: (model, batch) -> scalar, a mean over the batch.

    Raises:
        ValueError: when `batches` is an iterator.
    """

    def __init__(
        self, model: nn.Module, parameters: Sequence[tuple[nn.Parameter, int]], batches: Iterable[Any], loss: Loss
    ) -> None:
        if isinstance(batches, Iterator):
            raise ValueError("batches= is read several times here, and an iterator can be read once: give a list of it")
        self.model = model
        self.parameters = list(parameters)
        self.batches = batches
        self.loss = loss

    def gradients(self, topologies: Sequence[Topology]) -> list[Tensor]:
        """The mean gradient at every position, (numel,) of each weight, weights being zero outside `topologies`."""
        raise NotImplementedError

    def curvature(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """The Hessian of the mean loss times `vectors`, (numel,) of each weight."""
        raise NotImplementedError

    def flow(self, topologies: Sequence[Topology]) -> list[Tensor]:
        """The gradient of the summed outputs for an input of ones, every parameter replaced by its absolute value."""
        raise NotImplementedError


class NoProbe:
    """The `Probe` of a start without batches, which is never asked."""

    def gradients(self, topologies: Sequence[Topology]) -> list[Tensor]:
        """Raise ValueError."""
        raise ValueError(_NO_BATCHES)

    def curvature(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """Raise ValueError."""
        raise ValueError(_NO_BATCHES)

    def flow(self, topologies: Sequence[Topology]) -> list[Tensor]:
        """Raise ValueError."""
        raise ValueError(_NO_BATCHES)


_NO_BATCHES = "this start asks for gradients: declare Start(needs_batches=True), and give batches= and loss="


def _require_values(model: nn.Module) -> None:
    tensors = dict((*model.named_parameters(), *model.named_buffers()))
    on_meta = [name for name, tensor in tensors.items() if tensor.is_meta]
    if on_meta:
        raise ValueError(
            f"batches= asks for a gradient, and {len(on_meta)} of the model's {len(tensors)} tensors lie on the meta "
            f"device, where they have no values ({', '.join(on_meta[:3])}): build the model on a real device, or take "
            "a method that starts without a gradient"
        )
