"""What learned sparsity shares: needs, the choice by latent magnitude, and checks of penalties and rates."""

from __future__ import annotations

import math

from regrow.parts import (
    Allocation,
    Latent,
    Method,
    Need,
    activate_highest,
    constant,
    cubic,
    latent_magnitude,
    start_by,
    straight_through,
)

STRAIGHT = Need.DENSE_VALUES | Need.EVERY_GRADIENT
"""What straight-through methods need: values and gradients of inactive entries too."""


def by_magnitude(name: str, density: float | None, allocate: Allocation, ramp: int | None) -> Method:
    """After every step the largest latent magnitudes are active, at `density` or along a cubic ramp to it."""
    schedule = None if density is None else constant(density) if ramp is None else cubic(1.0, density, ramp)
    update = activate_highest(schedule, latent_magnitude, allocate, last=density)
    latent = Latent(straight_through)
    return Method(name, start_by(update), update, timing="after", needs=STRAIGHT, latent=latent)


def require_penalty(method: str, penalty: float) -> None:
    """Raise ValueError unless `penalty` is finite and at least 0."""
    if not 0 <= penalty < math.inf:
        raise ValueError(f"{method}: penalty must be at least 0, got {penalty:g}")


def require_rate(method: str, option: str, value: float | None) -> None:
    """Raise ValueError unless `value` is a learning rate or a decay, at least 0, or None."""
    if value is not None and not value >= 0:
        raise ValueError(f"{method}: {option} must be at least 0, got {value:g}: leave it out for that of the weights")
