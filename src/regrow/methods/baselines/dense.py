"""Dense training."""

from __future__ import annotations

from regrow import parts
from regrow.methods.recipe import recipe
from regrow.parts import Method, Need


@recipe
def dense() -> Method:
    """Ordinary dense training through the same code path: every entry active, no update.

    Examples:
        >>> dense().due(100)
        False
    """
    return Method("dense", parts.dense(), needs=Need.DENSE_VALUES)
