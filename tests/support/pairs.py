"""The same run in either storage: small models, their batches, and their tensors in the dense order of entries."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from regrow import Sparsifier, sparsify
from regrow.core.method import Method
from support.loops import loss_of
from support.table import OPTIMIZERS

CLASSES = 5


class Reader(nn.Module):
    """Something that reads (batch, 4 steps, 6 features), and a linear head on what it says of the last step."""

    def __init__(self, body: nn.Module, features: int) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(features, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.read(x)[:, -1])

    def read(self, x: Tensor) -> Tensor:
        return self.body(x)[0]


class Attentive(Reader):
    """The same around self-attention."""

    def read(self, x: Tensor) -> Tensor:
        return self.body(x, x, x, need_weights=False)[0]


class Paired(nn.Module):
    """A bilinear layer on both parts of (batch, 6 + 5), and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Bilinear(6, 5, 9), nn.Linear(9, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x[:, :6], x[:, 6:]).tanh())


def _linear() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, CLASSES))


def _conv() -> nn.Module:
    first = [nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU()]
    return nn.Sequential(*first, nn.Conv2d(6, 6, 3, stride=2), nn.Flatten(), nn.Linear(24, CLASSES))


def _volume() -> nn.Module:
    first = [nn.Conv3d(2, 6, (2, 3, 2), padding=(1, 0, 1)), nn.Tanh()]
    return nn.Sequential(*first, nn.Conv3d(6, 4, 2, stride=(1, 1, 2), groups=2), nn.Flatten(), nn.Linear(16, CLASSES))


def _decoder() -> nn.Module:
    line = [nn.ConvTranspose1d(2, 6, 3), nn.Tanh(), nn.Unflatten(1, (2, 3))]
    plane = [nn.ConvTranspose2d(2, 6, 2, stride=2), nn.Tanh(), nn.Unflatten(1, (2, 3))]
    space = [nn.ConvTranspose3d(2, 4, 2, padding=1, groups=2), nn.Tanh(), nn.Flatten()]
    return nn.Sequential(*line, *plane, *space, nn.Linear(4 * 2 * 5 * 11, CLASSES))


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (_linear, (12,)),
    "conv": (_conv, (2, 6, 6)),
    "volume": (_volume, (2, 2, 4, 4)),
    "decoder": (_decoder, (2, 4)),
    "bilinear": (Paired, (11,)),
    "gru": (lambda: Reader(nn.GRU(6, 7, batch_first=True), 7), (4, 6)),
    "lstm": (lambda: Reader(nn.LSTM(6, 7, batch_first=True), 7), (4, 6)),
    "attention": (lambda: Attentive(nn.MultiheadAttention(6, 2, batch_first=True), 6), (4, 6)),
}
"""How a model is made, and the shape of one example."""


def model_of(net: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(1)
    return NETS[net][0]().to(dtype)


def batch(net: str, step: int, dtype: torch.dtype = torch.float64, size: int = 12) -> tuple[Tensor, Tensor]:
    """Examples of one of 16 batches, and the classes that a linear map gives them."""
    draw = torch.Generator().manual_seed(100 + step % 16)
    x = torch.randn(size, *NETS[net][1], generator=draw, dtype=torch.float64)
    teacher = torch.randn(x[0].numel(), CLASSES, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return x.to(dtype), (x.flatten(1) @ teacher).argmax(1)


class Run:
    """A model, its optimizer and its sparsifier, trained on batches that depend on the step alone."""

    def __init__(
        self,
        storage: Any,
        method: Method,
        net: str = "linear",
        optimizer: str = "sgd",
        dtype: torch.dtype = torch.float64,
        model: nn.Module | None = None,
        **options: Any,
    ) -> None:
        self.net, self.dtype = net, dtype
        self.model = model_of(net, dtype) if model is None else model
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        options = {"allow_dense": True, **options}
        self.sparsifier: Sparsifier = sparsify(self.model, self.optimizer, method, storage=storage, **options)

    def backward(self, step: int, factor: float = 1.0) -> float:
        loss = loss_of(self.model, batch(self.net, step, self.dtype))
        (loss * factor).backward()
        return loss.item()

    def step(self, step: int) -> float:
        self.optimizer.zero_grad()
        loss = self.backward(step)
        self.optimizer.step()
        return loss

    def go(self, first: int, last: int) -> Run:
        for step in range(first, last + 1):
            self.step(step)
        return self

    def tensors(self) -> dict[str, Tensor]:
        return tensors(self.model, self.optimizer)

    def require_equal(self, other: Run, tolerance: float = 1e-9) -> None:
        """The topologies are equal, and so are all tensors within a relative tolerance."""
        assert self.sparsifier.topologies == other.sparsifier.topologies
        ours, theirs = self.tensors(), other.tensors()
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            torch.testing.assert_close(tensor, theirs[name], rtol=tolerance, atol=tolerance, msg=name)


def positions(model: nn.Module) -> dict[str, Tensor]:
    """Flat positions of what is active in each compressed weight, read from its buffers."""
    found = {}
    for path, module in model.named_modules():
        for own, shape in getattr(module, "shapes", {}).items():
            starts, columns = module.get_buffer(f"{own}_starts"), module.get_buffer(f"{own}_columns").long()
            rows = torch.arange(starts.numel() - 1).repeat_interleave(starts.diff())
            unit = module.get_buffer(f"{own}_unit").tolist() if own in module.units else [1] * len(shape)
            grid = [-(-size // step) for size, step in zip(shape, unit, strict=True)]
            found[f"{path}.{own}".removeprefix(".")] = of_units(rows * math.prod(grid[1:]) + columns, shape, unit)
    return found


def of_units(units: Tensor, shape: Sequence[int], unit: Sequence[int]) -> Tensor:
    """Flat positions of the entries of units, one unit after the other, in each the first axis fastest."""
    along = np.indices(shape).reshape(len(shape), -1)
    steps = np.array(unit)[:, None]
    grid = [-(-size // step) for size, step in zip(shape, unit, strict=True)]
    of = np.ravel_multi_index(list(along // steps), grid)
    rank = {int(u): i for i, u in enumerate(units)}
    mine = np.flatnonzero(np.isin(of, units.numpy()))
    # np.lexsort sorts by its last key first.
    order = np.lexsort((*along[:, mine], [rank[int(u)] for u in of[mine]]))
    return torch.from_numpy(mine[order])


def held(model: nn.Module, *optimizers: Optimizer) -> Iterator[tuple[str, str, Tensor]]:
    """(parameter, "value" or "grad" or the name of a state, tensor) of everything that is there."""
    for name, parameter in model.named_parameters():
        yield name, "value", parameter.detach()
        if parameter.grad is not None:
            yield name, "grad", parameter.grad
        for optimizer in optimizers:
            for key, state in optimizer.state.get(parameter, {}).items():
                if torch.is_tensor(state):
                    yield name, key, state


def require_inert_tails(model: nn.Module, *optimizers: Optimizer) -> None:
    """Value, gradient and optimizer state of every compressed weight are zero beyond its active entries."""
    at = positions(model)
    for name, kind, tensor in held(model, *optimizers):
        if name in at and tensor.dim():
            assert not tensor[at[name].numel() :].any(), f"{kind} of {name} beyond its active entries"


def tensors(model: nn.Module, *optimizers: Optimizer) -> dict[str, Tensor]:
    """Everything that is there, flat, in compressed weights with their zeros: alike in both storages."""
    at = positions(model)
    found = {}
    for name, kind, tensor in held(model, *optimizers):
        flat = tensor.reshape(-1)
        if name in at and tensor.dim():
            path, _, own = name.rpartition(".")
            size = math.prod(cast(Any, model.get_submodule(path)).shapes[own])
            flat = flat.new_zeros(size).index_put((at[name],), flat[: at[name].numel()])
        found[f"{name}:{kind}"] = flat.detach().clone()
    return found
