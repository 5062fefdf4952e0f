"""Plain text tables."""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence


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


def some(names: Sequence[str], separator: str = ", ", most: int = 5) -> str:
    """The first names, and how many more there are; "none" where there are none.

    Examples:
        >>> some(["a", "b", "c"], most=2), some([])
        ('a, b and 1 more', 'none')
    """
    shown = separator.join(names[:most]) or "none"
    return shown if len(names) <= most else f"{shown} and {len(names) - most:,} more"


def folded(names: Sequence[str], kinds: Sequence[Hashable]) -> dict[str, list[int]]:
    """Names of one kind that differ in a run of three or more numbers, as one: name -> places of its members, in order.

    Examples:
        >>> folded(["0.up", "0.down", "1.up", "1.down", "2.up", "2.down", "head"], list("abababc"))
        {'0-2.up': [0, 2, 4], '0-2.down': [1, 3, 5], 'head': [6]}
        >>> folded(["a[0]", "a[1]"], "aa")
        {'a[0]': [0], 'a[1]': [1]}
    """
    parts = {tuple(re.split(r"(\d+)", name)): [i] for i, name in enumerate(names)}
    # From the last number to the first, so that blocks of a layer are folded before layers.
    for at in range(max((len(p) for p in parts), default=0) - 2, 0, -2):
        runs: dict[Hashable, list[tuple[str, ...]]] = {}
        for part in parts:
            one_kind = at < len(part) and part[at].isdigit()
            runs.setdefault(
                (part[:at], part[at + 1 :], kinds[parts[part][0]]) if one_kind else (part, part), []
            ).append(part)
        parts = {
            key: members for run in runs.values() for key, members in _fold(run, at, [parts[part] for part in run])
        }
    return {"".join(part): members for part, members in sorted(parts.items(), key=lambda item: item[1][0])}


def _fold(run: list[tuple[str, ...]], at: int, members: list[list[int]]) -> list[tuple[tuple[str, ...], list[int]]]:
    """One entry for a run of consecutive numbers at a place, or what is there where it is none."""
    numbers = [int(part[at]) for part in run] if len(run) > 2 else []
    if len(run) < 3 or numbers != list(range(numbers[0], numbers[0] + len(run))):
        return list(zip(run, members, strict=True))
    name = (*run[0][:at], f"{numbers[0]}-{numbers[-1]}", *run[0][at + 1 :])
    return [(name, sorted(i for each in members for i in each))]
