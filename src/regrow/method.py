"""The vocabulary of a method: plain callables, and the tuples that hold them together.

A method says how the first topologies are made (`start`), how they change (`update`), what is watched at every
step (`observe`), when an update happens within its step (`timing`), and what it must be given (`needs`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from enum import Flag, auto
from typing import Literal, NamedTuple, Protocol

from torch import Tensor

from regrow.topology import Topology
from regrow.weight import Sized, SparseWeight, Weights

Score = Callable[[SparseWeight], Tensor]
"""How much each active entry deserves to stay: weight -> (nnz,)."""

Field = Callable[[SparseWeight], Iterator[tuple[int, Tensor]]]
"""A value for every position, streamed: weight -> (first flat position, block (n,)), ascending."""

Growth = Callable[[SparseWeight, Topology, int], Tensor]
"""Where entries appear: (weight, taken, count) -> (count,) distinct flat positions outside `taken`."""

Drop = Callable[[Sequence[SparseWeight], Sequence[float]], list[Topology]]
"""What stays: (weights, the fraction that each loses) -> the kept topology of each."""

Allocation = Callable[[Sequence[Sized], Sequence[Tensor] | None, int | None], list[int]]
"""Counts per weight: (weights, their scores or None, total or None) -> counts that sum to the total."""

Statistic = Callable[[SparseWeight], float]
"""A weight's share of what is redistributed, >= 0."""

Structure = Callable[[SparseWeight, Tensor, int], Topology]
"""Which patterns are allowed: (weight, a score for every position (numel,), count) -> the best one of about `count`."""

Observer = Callable[[SparseWeight], None]
"""Sees a weight with its gradient once before every optimizer step."""

Timing = Literal["instead", "after"]
"""Whether an update takes the place of its optimizer step or follows it."""

Regrow = Literal["keep", "reset", "forbid"]
"""What happens to an entry that is dropped and would grow again at once."""


class Need(Flag):
    """What a method must be given beyond the active values and gradients, so that a storage can refuse it."""

    NOTHING = 0
    GRADIENT = auto()
    """The gradient at every position, at updates."""
    EVERY_GRADIENT = auto()
    """The gradient at every position, at every step."""
    EXPLORED = auto()
    """The set of positions that were ever active, for the exploration rate R_s."""
    DENSE_VALUES = auto()
    """A value at every position during training, as a ramp from dense has at first."""
    ROOM = auto()
    """Room in each weight for more entries than it starts with, since weights trade them."""


class Rule(NamedTuple):
    """One act on the topologies and the steps at which it is due; `due` is pure."""

    apply: Callable[[Weights, int], None]
    due: Callable[[int], bool] = lambda step: True
    last: int | None = None
    """A step at which the act is due whatever gate is put around it: the end of a ramp."""
    require: Callable[[Weights], object] = lambda weights: None
    """Raises at once when these weights can never satisfy the rule."""


Update = tuple[Rule, ...]
"""Rules applied in order, each where it is due; joined with `chain`."""


class Probe(Protocol):
    """What a start may ask of the model and the batches that it was given; nothing is changed by asking.

    All tensors are (numel,) of one weight each, in the order of the weights.
    """

    def gradients(self, topologies: Sequence[Topology]) -> list[Tensor]:
        """The mean gradient over the batches at every position, where the weights are zero outside `topologies`."""
        ...

    def curvature(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """The Hessian of the mean loss over the batches times `vectors`."""
        ...

    def flow(self, topologies: Sequence[Topology]) -> list[Tensor]:
        """The gradient of the summed outputs for an input of ones, every parameter replaced by its absolute value."""
        ...


class Start(NamedTuple):
    """How the first topologies are made."""

    make: Callable[[Weights, Probe], object]
    needs_gradient: bool = False
    """Whether one gradient must be there: it then takes the place of the first optimizer step."""
    require: Callable[[Weights], object] = lambda weights: None
    """Raises at once when these weights can never satisfy the start."""
    needs_batches: bool = False
    """Whether the probe is asked, which takes `batches` and `loss`."""


class Method(NamedTuple):
    """A recipe of sparse training; composed from parts, never subclassed."""

    name: str
    start: Start
    update: Update = ()
    observe: Observer | None = None
    timing: Timing = "instead"
    needs: Need = Need.NOTHING

    def due(self, step: int) -> bool:
        """Whether optimizer step `step` (the first is 1) changes topologies."""
        return any(rule.due(step) for rule in self.update)
