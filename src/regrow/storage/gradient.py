"""What backward passes leave in one parameter; every storage holds one of these."""

from __future__ import annotations

import weakref
from collections.abc import Callable

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from regrow.core import selection


class Gradient:
    """The gradient of one parameter: how many backward passes reached it, its scale, and what is held of it.

    Args:
        parameter: the one that is watched.
        name: how errors call it.
    """

    def __init__(self, parameter: nn.Parameter, name: str) -> None:
        self.parameter = parameter
        self.name = name
        self.arrivals = 0
        """Backward passes that reached the parameter so far."""
        self._scale = 1.0
        """Readers divide the gradient by this."""
        self._held: Tensor | None = None
        """What was set aside of the gradient until the step is closed; it is then read in its place."""
        self._earlier = 0
        """Arrivals that belong to steps before this one."""
        self._at_open = 0
        """Arrivals when the last step was opened."""
        self._arrived: weakref.WeakMethod[Callable[[Tensor], None]] | None = None
        self._handle: RemovableHandle | None = None

    def watch(self, arrived: Callable[[Tensor], None]) -> None:
        """Count backward passes from now on, and call the method `arrived` with the gradient after each."""
        self._arrived = weakref.WeakMethod(arrived)
        weak = weakref.ref(self)

        def hook(parameter: Tensor) -> None:
            """Weak, since the garbage collector does not see through a tensor's hooks."""
            gradient = weak()
            if gradient is not None and parameter.grad is not None:
                gradient._arrives(parameter.grad)

        self._handle = self.parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]

    def _arrives(self, grad: Tensor) -> None:
        self.arrivals += 1
        arrived = None if self._arrived is None else self._arrived()
        if arrived is not None:
            arrived(grad)

    def remove(self) -> None:
        """Stop counting."""
        if self._handle is not None:
            self._handle.remove()

    def opened(self) -> None:
        """A training step begins; if the step before was never closed, what arrived until it opened belonged to it."""
        self._earlier = max(self._earlier, self._at_open)
        self._at_open = self.arrivals

    def closed(self, complete: bool) -> None:
        """A training step ends: what was held is forgotten; all that arrived belonged to it if it is `complete`."""
        self._held, self._scale = None, 1.0
        if complete:
            self._earlier = self.arrivals

    def hold(self) -> None:
        """Keep the gradient as it is now, since the parameter's own may be gone when it is read."""
        if self._held is None and self.parameter.grad is not None:
            self._held = self.parameter.grad.detach().clone()

    def let_go(self) -> None:
        """Forget what is held."""
        self._held = None

    def divide(self, scale: float) -> None:
        """Divide by `scale` whatever is read until the step is closed."""
        self._scale = scale

    @property
    def held(self) -> Tensor | None:
        """What is held, of the parameter's shape."""
        return self._held

    @property
    def scale(self) -> float:
        """Readers divide the gradient by this."""
        return self._scale

    @property
    def latest(self) -> Tensor | None:
        """What is held, or else the parameter's own gradient."""
        return self.parameter.grad if self._held is None else self._held

    @property
    def reached(self) -> bool:
        """Whether the last backward reached the parameter; a gradient that someone zeroed or wrote is looked at."""
        grad = self.latest
        return grad is not None and (self.arrivals > self._earlier or bool(grad.any()))

    def read(self) -> Tensor:
        """The gradient without its scale, of the parameter's shape.

        Raises:
            ValueError: when no backward reached the parameter.
        """
        grad = self.latest
        if grad is None:
            raise ValueError(f"{self.name} has no gradient: call loss.backward() before optimizer.step()")
        return grad if self._scale == 1 else grad / self._scale

    def require_finite(self) -> None:
        """Raise ValueError when the gradient that would be read is not finite."""
        grad = self.latest
        if grad is not None and not selection.is_finite(grad):
            bad = int((~grad.isfinite()).sum())
            raise ValueError(
                f"{self.name}: {bad:,} of {grad.numel():,} gradients are not finite at an update: lower the "
                "learning rate, or skip such steps with a gradient scaler"
            )

    def not_kept(self) -> ValueError:
        """What is raised when someone reads the gradient at inactive positions where it was not kept."""
        return ValueError(
            f"{self.name}: the gradient at inactive positions is not kept here: declare it in the method's needs "
            "(Need.GRADIENT or Need.EVERY_GRADIENT)"
        )
