"""What dynamic sparse training is compared with: no sparsity at all, and a topology that never changes."""

from __future__ import annotations

from regrow.core.checks import require_density
from regrow.core.method import Allocation, Method, Need
from regrow.parts import starts
from regrow.parts.allocation import erk


def dense() -> Method:
    """Ordinary dense training through the same code path: every entry active, no update.

    Examples:
        >>> dense().due(100)
        False
    """
    return Method("dense", starts.dense(), needs=Need.DENSE_VALUES)


def static(density: float | None, *, allocate: Allocation = erk) -> Method:
    """A random topology that never changes.

    Args:
        density: active share of the sparsified entries, in (0, 1]; None leaves it to an explicit allocation.
        allocate: how the active entries are shared among the weights.

    Source: Evci et al. 2020, Rigging the Lottery, section 4 ("Static").

    Examples:
        >>> static(0.1).name
        'static'
    """
    require_density("static", density)
    return Method("static", starts.random_topology(density, allocate))
