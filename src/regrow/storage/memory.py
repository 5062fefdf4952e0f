"""How much of what a backward reads may be kept for an update."""

from __future__ import annotations

import os
import weakref
from pathlib import Path
from typing import Protocol


class Keeps(Protocol):
    """What takes part in a claim: something that keeps bytes, and can forget some of them."""

    @property
    def kept_bytes(self) -> int:
        """Bytes that it keeps."""
        ...

    def forget_unfinished(self) -> None:
        """Forget what no gradient contains."""
        ...


class Memory:
    """The bytes of inputs and output gradients that the parameters of one model may keep together.

    Args:
        limit: at most so many; None is a quarter of what is free now.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = _free() // 4 if limit is None else limit
        # Weak, since what joins refers to this.
        self._members: weakref.WeakSet[Keeps] = weakref.WeakSet()

    def join(self, member: Keeps) -> None:
        """Count what `member` keeps from now on."""
        self._members.add(member)

    def claim(self, more: int) -> None:
        """Ask for `more` bytes, for which members forget what they can do without.

        Raises:
            RuntimeError: when even then the limit would be passed.
        """
        if self._kept() + more > self.limit:
            for member in self._members:
                member.forget_unfinished()
        kept = self._kept()
        if kept + more > self.limit:
            raise RuntimeError(
                f"an update would keep at least {kept + more:,} bytes of inputs and output gradients, above the limit "
                f"of {self.limit:,}: raise update_memory= in regrow.sparsify, or lower the batch size"
            )

    def _kept(self) -> int:
        return sum(member.kept_bytes for member in self._members)


def _free() -> int:
    """Bytes of memory that are available now."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
