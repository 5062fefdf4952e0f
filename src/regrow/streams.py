"""Random draws that depend on nothing but (seed, name, step).

A sparse network must have the same topologies on every rank, device, run and version, so no global generator
is read: each weight gets a fresh counter-based stream at every step, keyed by a stable hash. Only raw 64-bit
words of Philox are used, whose sequence is fixed by its definition; everything above them is arithmetic.
"""

from __future__ import annotations

import hashlib
from functools import cached_property

import numpy as np
from numpy.typing import NDArray


class Stream:
    """A sequence of draws determined by `seed`, the weight's canonical `name` and the optimizer `step`.

    Examples:
        >>> Stream(0, "fc.weight", 100).subset(10, 3).tolist()
        [0, 5, 9]
        >>> Stream(0, "fc.weight", 100).subset(10, 3).tolist()
        [0, 5, 9]
    """

    def __init__(self, seed: int, name: str, step: int) -> None:
        self._key = f"{seed}\0{name}\0{step}"

    @cached_property
    def _words(self) -> np.random.Philox:
        """Made at the first draw, since most steps draw nothing."""
        digest = hashlib.blake2b(self._key.encode(), digest_size=16).digest()
        return np.random.Philox(key=int.from_bytes(digest, "little"))

    def integers(self, high: int, count: int) -> NDArray[np.int64]:
        """`count` independent integers in [0, high), shape (count,); the bias is below high / 2**64."""
        words = np.asarray(self._words.random_raw(count), dtype=np.uint64)
        return (words % np.uint64(high)).astype(np.int64)

    def uniform(self, count: int) -> NDArray[np.float64]:
        """`count` independent reals in [0, 1) with 53 random bits, shape (count,)."""
        words = np.asarray(self._words.random_raw(count), dtype=np.uint64)
        return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def subset(self, total: int, count: int) -> NDArray[np.int64]:
        """A uniformly random subset of [0, total) with `count` members, ascending, shape (count,).

        Costs O(count log count) while count <= total / 2: the first `count` distinct values of a sequence of
        independent draws. Above that the complement is drawn, at O(total) and the memory of the answer.

        Raises:
            ValueError: when `count` lies outside [0, total].
        """
        if not 0 <= count <= total:
            raise ValueError(f"a subset of {total:,} members cannot have {count:,}: ask for 0 to {total:,}")
        if count > total // 2:
            absent = np.zeros(total, dtype=bool)
            absent[self.subset(total, total - count)] = True
            return np.flatnonzero(~absent)
        chosen = np.empty(0, dtype=np.int64)
        while chosen.size < count:
            # Drawing exactly what is missing never overshoots, so the law is that of one draw at a time. Sorted and
            # compared with the next: ten times as fast as numpy's own unique.
            drawn = np.concatenate([chosen, self.integers(total, count - chosen.size)])
            drawn.sort()
            chosen = drawn[np.append(True, drawn[1:] != drawn[:-1])]
        return chosen
