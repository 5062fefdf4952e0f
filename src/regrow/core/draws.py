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

_ONE, _GOLDEN = np.uint64(1), np.uint64(0x9E3779B97F4A7C15)


class Stream:
    """A sequence of draws determined by `seed`, the weight's canonical `name` and the optimizer `step`.

    Examples:
        >>> Stream(0, "fc.weight", 100).subset(10, 3).tolist()
        [0, 5, 9]
        >>> Stream(0, "fc.weight", 100).subset(10, 3).tolist()
        [0, 5, 9]
    """

    def __init__(self, seed: int, name: str, step: int) -> None:
        self._place = f"{seed}\0{name}"
        self._key = f"{self._place}\0{step}"

    @cached_property
    def _words(self) -> np.random.Philox:
        """Made at the first draw, since most steps draw nothing."""
        return np.random.Philox(key=_key(self._key, 16))

    def integers(self, high: int, count: int) -> NDArray[np.int64]:
        """`count` independent integers in [0, high), shape (count,); the bias is below high / 2**64."""
        words = np.asarray(self._words.random_raw(count), dtype=np.uint64)
        return (words % np.uint64(high)).astype(np.int64)

    def uniform(self, count: int) -> NDArray[np.float64]:
        """`count` independent reals in [0, 1) with 53 random bits, shape (count,)."""
        words = np.asarray(self._words.random_raw(count), dtype=np.uint64)
        return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def normal(self, count: int) -> NDArray[np.float64]:
        """`count` independent draws of mean 0 and variance 1, all but normal, shape (count,).

        Each is the centred sum of twelve 16-bit integers over 2**16: logarithms and cosines differ in their last bit
        from one processor to the next, sums do not. It ends at 6, and its fourth moment is 2.9 where that of a normal
        draw is 3.
        """
        words = np.asarray(self._words.random_raw(3 * count), dtype=np.uint64)
        sums: NDArray[np.int64] = words.view(np.uint16).reshape(count, 12).sum(axis=1, dtype=np.int64)
        return (sums - 6 * (2**16 - 1)).astype(np.float64) * 2.0**-16

    def signs(self, positions: NDArray[np.int64]) -> NDArray[np.int8]:
        """-1 or 1 for each of `positions` (n,), (n,): always the same for a seed and name, whatever the step.

        Nothing is drawn: position p gets the highest bit of output number p of SplitMix64, whose seed is the stable
        hash of (seed, name).
        """
        z = np.uint64(_key(f"{self._place}\0signs", 8)) + (positions.astype(np.uint64) + _ONE) * _GOLDEN
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
        return (np.int8(1) - np.int8(2) * (z >> np.uint64(63)).astype(np.int8)).astype(np.int8)

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


def _key(text: str, size: int) -> int:
    """A stable hash of `text` with `size` bytes."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=size).digest(), "little")
