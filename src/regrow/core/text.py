"""Plain text tables."""

from __future__ import annotations

from collections.abc import Sequence


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns under `head`; the first is aligned left, the others right.

    Examples:
        >>> print(table(["layer", "active"], [["fc", "20"]]))
        layer  active
        fc         20
    """
    lines = [list(head), *[list(row) for row in rows]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]

    def text(line: list[str]) -> str:
        return "  ".join(
            c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()

    return "\n".join(text(line) for line in lines)


def by(sizes: Sequence[int]) -> str:
    """Sizes as they are spoken.

    Examples:
        >>> by((300, 784))
        '300 x 784'
    """
    return " x ".join(map(str, sizes))
