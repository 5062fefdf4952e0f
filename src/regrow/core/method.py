"""The vocabulary of a method: plain callables, and the tuples that hold them together.

A method says how the first topologies are made (`start`), how they change (`update`), what is watched at every
step (`observe`), when an update happens within its step (`timing`), what it must be given (`needs`), and how weights
are computed where others are trained in their place (`latent`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Flag, auto
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from regrow.core.draws import Stream
from regrow.core.topology import Topology
from regrow.core.units import Pool
from regrow.core.weight import Sized, SparseWeight, Weights

Score = Callable[[SparseWeight], Tensor]
"""How much each active entry deserves to stay: weight -> (nnz,)."""

Field = Callable[[SparseWeight], Iterator[tuple[int, Tensor]]]
"""A value for every entry, streamed in whole rows of units: weight -> (first flat position, block (n,)), ascending."""

Growth = Callable[[SparseWeight, Topology, int], Tensor]
"""Where entries appear: (weight, taken, count) -> (count,) distinct flat positions outside `taken`."""

Drop = Callable[[Sequence[SparseWeight], Sequence[float]], list[Topology]]
"""What stays: (weights, the fraction that each loses) -> the kept topology of each."""

Allocation = Callable[[Sequence[Sized], Sequence[Tensor] | None, int | None], list[int]]
"""Counts per weight: (weights, their scores or None, total of entries or None) -> units of each.

Their entries sum to the total, as nearly as whole units come, or to all that is active where that is less. One with a
budget of its own, in FLOPs, says what its total means."""

Statistic = Callable[[SparseWeight, Topology], float]
"""A weight's share of what is redistributed, >= 0: (weight before the drop, what it keeps) -> share."""

Structure = Callable[[SparseWeight, Tensor, int], Topology]
"""Which patterns are allowed: (weight, a score for every position (numel,), count) -> the best one of about `count`."""

Observer = Callable[[SparseWeight], None]
"""Sees a weight with its gradient once before every optimizer step."""

Timing = Literal["instead", "after"]
"""Whether an update takes the place of its optimizer step or follows it."""

Regrow = Literal["keep", "reset", "forbid"]
"""What happens to an entry that is dropped and would grow again at once."""


@dataclass(frozen=True)
class Units:
    """What is active or inactive together, and how the scores of a unit's entries become one."""

    box: Callable[[Sized], tuple[int, ...]]
    """How many entries a unit spans along each axis of a weight."""
    pool: Pool
    """How the scores of a unit's entries become one."""


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
    OVERSHOOT = auto()
    """Room in each weight for twice as many entries as it starts with, since it holds more for a while."""


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


class Trained(NamedTuple):
    """A tensor that is trained beside a weight's latent values, by the optimizer that holds the weight."""

    name: str
    """Its key in the weight's `state`."""
    first: Callable[[Parts], Tensor]
    """Its first values, from what the weight is computed from without it."""
    lr: float | None = None
    """Learning rate; None is that of the weight."""
    weight_decay: float | None = None
    """Weight decay; None is that of the weight."""


class Parts(NamedTuple):
    """What a weight is computed from; gradients flow to `latent` and to what of `state` is trained."""

    latent: Tensor
    """The values that the optimizer steps, of the weight's shape, in float32 at least."""
    active: Tensor
    """The present topology, bool of the weight's shape."""
    state: Mapping[str, Tensor]
    """The weight's state: tensors trained beside the latent values, and what rules keep there."""
    noise: Tensor | None = None
    """The draws of this step, of the weight's shape; None asks for the weight that is evaluated."""
    in_axis: int = 1
    """Which axis counts the inputs."""


class Latent(NamedTuple):
    """How a weight is computed from values that are trained in its place, as pure functions.

    The optimizer steps the latent values with its own arithmetic. The model holds the weight computed from them, zero
    outside the topology; the gradient does not see that zero, so what `effective` does not hide from it goes straight
    through to inactive positions.
    """

    effective: Callable[[Parts], Tensor]
    """The weight, of its shape, differentiable."""
    trained: tuple[Trained, ...] = ()
    """What is trained beside the latent values."""
    penalty: Callable[[Parts, int], Tensor] | None = None
    """What is added to the loss at an optimizer step, a scalar tensor."""
    reach: Callable[[Parts], Tensor] | None = None
    """Where the gradient of the loss may be read, bool of the weight's shape; None is everywhere."""
    noise: Callable[[Stream, int], NDArray[np.float64]] | None = None
    """Draws that every training forward of a step shares: (stream, n) -> (n,)."""


class Made(NamedTuple):
    """The call of a recipe that made a method."""

    recipe: Callable[..., Method]
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    parts: tuple[Any, ...]
    """What the method was made of."""


class Method(NamedTuple):
    """A recipe of sparse training; composed from parts, never subclassed.

    What a recipe made can be pickled: the call is kept, since parts are closures. What was composed or changed by hand
    can be if its parts can.
    """

    name: str
    start: Start
    update: Update = ()
    observe: Observer | None = None
    timing: Timing = "instead"
    needs: Need = Need.NOTHING
    latent: Latent | None = None
    """How weights are computed from others that are trained; None trains the weights themselves."""
    units: Units | None = None
    """What is active or inactive together; None is every entry by itself."""
    made: Made | None = None
    """The call of a recipe that made it; of no account once a part was replaced."""

    def __reduce__(self) -> tuple[Callable[..., Method], tuple[Any, ...]]:
        if self.made is not None and all(now is then for now, then in zip(self[:-1], self.made.parts, strict=True)):
            return _again, self.made[:3]
        return Method, self[:-1]

    def due(self, step: int) -> bool:
        """Whether optimizer step `step` (the first is 1) changes topologies."""
        return any(rule.due(step) for rule in self.update)


def _again(recipe: Callable[..., Method], arguments: tuple[Any, ...], options: dict[str, Any]) -> Method:
    return recipe(*arguments, **options)
