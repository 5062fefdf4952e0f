"""What gradual methods share: a density that must be given, and a last layer that keeps one of its own."""

from __future__ import annotations

from typing import NamedTuple

from regrow.core.checks import require_density
from regrow.parts import (
    Allocation,
    Schedule,
    Update,
    Weights,
    checked,
    last_at_least,
    magnitude,
    prune,
    require_last,
)


def require_target(name: str, density: float | None) -> None:
    """Raise ValueError unless a density is given that lies in (0, 1]."""
    if density is None:
        raise ValueError(f"{name}: give a density, which the allocation only shares out")
    require_density(name, density)


class Last(NamedTuple):
    """The layer that keeps a least density."""

    density: float
    layer: str | None

    def of(self, allocate: Allocation) -> Allocation:
        """`allocate` with that layer's least density."""
        return last_at_least(self.density, self.layer, allocate)


def last_of(name: str, density: float | None, layer: str | None) -> Last | None:
    """The options `last_density` and `last_layer` as one value.

    Raises:
        ValueError: when the density lies outside [0, 1], or a layer is given without one.
    """
    if density is None and layer is not None:
        raise ValueError(
            f"{name}: last_layer ({layer!r}) says where last_density holds, and that is None: give a density, or "
            "leave last_layer out"
        )
    if density is not None and not 0 <= density <= 1:
        raise ValueError(f"{name}: last_density must lie in [0, 1], got {density:g}")
    return None if density is None else Last(density, layer)


def pruning(ramp: Schedule, allocate: Allocation, last: Last | None) -> Update:
    """Prune magnitudes along the ramp; refused at once where the final total does not hold the last layer's density."""
    if last is None:
        return prune(ramp, magnitude, allocate)

    def require(weights: Weights) -> None:
        require_last(last.density, last.layer, weights, weights.total(ramp(ramp.until or 0)))

    return checked(prune(ramp, magnitude, last.of(allocate)), require)
