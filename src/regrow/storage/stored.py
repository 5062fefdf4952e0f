"""What the engine asks of a storage: a few facts about one parameter, and the events of a training step."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import ClassVar, Literal

from torch import nn
from torch.optim import Optimizer

from regrow.core.topology import Topology
from regrow.core.weight import SparseWeight
from regrow.storage.gradient import Gradient
from regrow.storage.state import gradient_scale

Storage = Literal["masked", "compressed"]
"""How the values of a parameter are held."""


class Draft:
    """A parameter that is to be sparsified, until `become` makes it what its storage holds.

    Its weights have topologies already and can be rewired; they read the gradient in `parameter.grad`.
    """

    storage: ClassVar[Storage]
    parameter: nn.Parameter
    optimizer: Optimizer
    gradient: Gradient

    @property
    def weights(self) -> Sequence[SparseWeight]:
        """The weights that it holds: one, or several equal blocks of leading rows."""
        raise NotImplementedError

    def require_free(self) -> None:
        """Raise ValueError when something would keep `become` from doing its work."""

    def become(self, room: int, seed: int) -> Stored:
        """Take the form in which values are stored, once the first topologies are known.

        Args:
            room: the most entries that the parameter will ever hold.
            seed: of the values, where there are none yet.
        """
        raise NotImplementedError

    def remove(self) -> None:
        """Detach from parameter and optimizer; the values stay."""
        self.gradient.remove()


class Stored(Draft):
    """One parameter as its storage holds it.

    The engine tells it the events of a training step; each of them does no more than a storage says. A step goes
    opened, reading, set_aside, mask, then stepping and stepped around the optimizer's arithmetic, then closed.
    """

    def watch(self, everywhere: bool) -> None:
        """Whether the coming backward passes keep the gradient at inactive positions."""

    def project(self, state: bool) -> None:
        """Make sure that values are zero outside the topology, and on demand the optimizer's `state` too."""

    def non_zeros(self, topologies: Sequence[Topology]) -> list[int] | None:
        """How many values at the active entries of such topologies are not zero; None where values are computed."""
        return None

    def strays(self) -> int:
        """How many values outside the topology are not zero, and would be lost at the next projection."""
        return 0

    def opened(self, loaded: bool) -> None:
        """A training step begins: scale what was set aside as the gradient was clipped or unscaled since."""
        self.gradient.opened()
        self.project(loaded)

    def reading(self, update: bool) -> None:
        """An observer is about to read gradients, or an `update`, for which they must be finite (else ValueError)."""
        self.gradient.divide(gradient_scale(self.optimizer))
        if update:
            self.gradient.require_finite()

    def set_aside(self, lasting: bool = False) -> None:
        """Keep what growth reads of the gradient until the step is closed, and leave active entries in `grad`.

        Args:
            lasting: keep it also when the next backward comes before that, or the gradient is gone.
        """
        self.mask()

    def mask(self) -> None:
        """Leave the optimizer a gradient of active entries only."""

    def stepping(self, step: int) -> None:
        """The optimizer is about to take step number `step`."""

    def stepped(self) -> None:
        """The optimizer has stepped."""

    def closed(self, complete: bool) -> None:
        """A training step ends: forget what was set aside.

        Args:
            complete: whether all that arrived belongs to it; not so when a new backward came first.
        """
        self.gradient.closed(complete)

    def shows(self, training: bool) -> bool:
        """Whether the parameter holds what a model in this mode computes with."""
        return True

    def show(self, training: bool) -> None:
        """Hold what a model in this mode computes with."""

    def hardened(self, remember: Collection[str]) -> Stored:
        """The parameter in masked storage, if its values are computed from others; with its topologies.

        Args:
            remember: what of the weights' `state` goes along.
        """
        return self
