"""Inputs and output gradients that a step leaves behind, from which the gradient at every position can be had."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable

from torch import Tensor

_keys = itertools.count(1)
_keepers: weakref.WeakValueDictionary[int, Keeper] = weakref.WeakValueDictionary()


class Keeper:
    """Keeps what the backward passes of one weight read, while its `key` is handed to their operators.

    Args:
        allow: called with the bytes about to be kept; raises where they are too many.
    """

    def __init__(self, allow: Callable[[int], None] = lambda n: None) -> None:
        self.key = next(_keys)
        self.pairs: list[tuple[Tensor, Tensor]] = []
        """(x, dy) of each backward pass, copies, as the operators of the weight take them."""
        self._allow = allow
        _keepers[self.key] = self

    @property
    def nbytes(self) -> int:
        """Bytes kept."""
        return sum(t.nbytes for pair in self.pairs for t in pair)

    def keep(self, x: Tensor, dy: Tensor) -> None:
        """Keep copies of x and dy."""
        self._allow(x.nbytes + dy.nbytes)
        self.pairs.append((x.detach().clone(), dy.detach().clone()))


def keep(key: int, x: Tensor, dy: Tensor) -> None:
    """Hand x and dy to the keeper of `key`; 0 is nobody."""
    keeper = _keepers.get(key) if key else None
    if keeper is not None:
        keeper.keep(x, dy)
