"""Checks of the numbers that users give, each an error of one sentence."""

from __future__ import annotations


def require_density(method: str, density: float | None) -> None:
    """Raise ValueError unless `density` is None (left to an explicit allocation) or lies in (0, 1]."""
    if density is not None and not 0 < density <= 1:
        raise ValueError(f"{method}: density must lie in (0, 1], got {density:g}: it is the active share, 1 - sparsity")


def require_fraction(method: str, fraction: float) -> None:
    """Raise ValueError unless `fraction` lies in [0, 1]."""
    if not 0 <= fraction <= 1:
        raise ValueError(f"{method}: the drop fraction must lie in [0, 1], got {fraction:g}")


def require_choice(method: str, option: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless `value` is among `choices`."""
    if value not in choices:
        raise ValueError(f"{method}: {option} must be one of {', '.join(choices)}, got {value!r}")


def require_timing(method: str, timing: str) -> None:
    """Raise ValueError unless an update comes "instead" of an optimizer step or "after" one."""
    require_choice(method, "timing", timing, ("instead", "after"))


def require_dynamic(method: str, density: float | None, fraction: float, regrow_dropped: str, timing: str) -> None:
    """Raise ValueError unless the options that all dynamic methods share make sense."""
    require_density(method, density)
    require_fraction(method, fraction)
    require_choice(method, "regrow_dropped", regrow_dropped, ("keep", "reset", "forbid"))
    require_timing(method, timing)
