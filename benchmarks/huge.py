"""What the scripts that train layers too large to be dense share: a task, a loop, checks against brute force."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import regrow
from regrow.parts.drops import share


@dataclass
class Task:
    """Outputs and inputs are both linear in a few hidden numbers: y = B z, x = A z.

    Every output can be had from any handful of inputs, so a sparse layer can learn the map, and samples that were never
    trained on measure whether it did.
    """

    inputs: Tensor
    """A, (n_in, latent)."""
    outputs: Tensor
    """B, (n_out, latent)."""

    @classmethod
    def draw(cls, n_in: int, n_out: int, latent: int, generator: torch.Generator) -> Task:
        """Random directions of unit length, so that every input and every output has unit variance."""
        sides = [F.normalize(torch.randn(n, latent, generator=generator)) for n in (n_in, n_out)]
        return cls(*sides)

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """x (size, n_in) and y (size, n_out), both feature-major: the batch is the contiguous axis."""
        z = torch.randn(self.inputs.shape[1], size, generator=generator)
        return (self.inputs @ z).t(), (self.outputs @ z).t()


@dataclass
class Before:
    """A layer as an update found it, with what its gradient is made of."""

    step: int
    indices: np.ndarray
    values: np.ndarray
    x: Tensor
    dy: Tensor


class Watch:
    """Remembers a layer as updates find it: before the step that they replace, or after the step that they follow.

    To be made before `regrow.sparsify`, so that its hooks run first.
    """

    def __init__(self, layer: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.layer = layer
        self.operands: list[Tensor] = []
        self.due = False
        self.found: tuple[np.ndarray, np.ndarray] | None = None
        layer.register_forward_hook(self._forward)
        optimizer.register_step_pre_hook(self._look)
        optimizer.register_step_post_hook(self._look)

    def _forward(self, layer: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
        if self.due and y.requires_grad:
            y.register_hook(lambda dy: self.operands.extend((args[0], dy)))

    def _look(self, optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
        indices = self.layer.topology().indices.numpy() if self.due else None
        if indices is not None and (self.found is None or np.array_equal(indices, self.found[0])):
            self.found = indices, self.layer.weight.detach().numpy().copy()


def peak_bytes() -> int:
    """The most memory that this process ever had resident."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def train(
    watch: Watch,
    optimizer: torch.optim.Optimizer,
    sparsifier: regrow.Sparsifier,
    task: Task,
    steps: int,
    batch: int,
    generator: torch.Generator,
) -> Iterator[Before]:
    """An ordinary loop, which yields after each update what it found."""
    for step in range(1, steps + 1):
        begun = time.perf_counter()
        watch.due = sparsifier.due
        x, y = task.batch(batch, generator)
        optimizer.zero_grad()
        loss = F.mse_loss(watch.layer(x), y)
        loss.backward()
        optimizer.step()
        if watch.due or step % 20 == 0 or step == 1:
            took = time.perf_counter() - begun
            print(f"step {step:4}  loss {loss.item():.4f}  {took:.2f} s{'  update' if watch.due else ''}", flush=True)
        if watch.found is not None:
            yield Before(step, *watch.found, *watch.operands)
            watch.found = None
            watch.operands.clear()


def kept_by_brute_force(before: Before, fraction: float) -> np.ndarray:
    """Positions that a drop of the smallest magnitudes leaves, ascending, by a stable sort of all."""
    n = len(before.values)
    order = np.argsort(-np.abs(before.values), kind="stable")[: n - share(fraction, n)]
    return np.sort(before.indices[order])


def among(some: np.ndarray, all_of: np.ndarray) -> np.ndarray:
    """Which of `some` are among `all_of`, both ascending; without the several copies of numpy's own set operations."""
    at = np.searchsorted(all_of, some)
    at[at == len(all_of)] = 0
    return all_of[at] == some


def held_out(layer: nn.Module, task: Task, seed: int, size: int) -> float:
    """Mean squared error on samples that training never sees."""
    x, y = task.batch(size, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return float(F.mse_loss(layer(x), y))


def require(what: str, holds: bool, *, log: Callable[[str], None] = print) -> None:
    """Say what was checked, and stop where it does not hold."""
    log(f"{'ok  ' if holds else 'FAIL'}  {what}")
    if not holds:
        sys.exit(1)
