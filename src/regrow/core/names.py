"""What weights are called, and which of them a pattern means."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from fnmatch import fnmatchcase


def canonical(name: str) -> str:
    """A parameter's name without the prefixes that DataParallel, DDP and torch.compile add."""
    return ".".join(part for part in name.split(".") if part not in ("module", "_orig_mod"))


def canonical_names(names: Iterable[str]) -> dict[str, str]:
    """Each name with its canonical form, or with itself where two would share one."""
    short = {name: canonical(name) for name in names}
    uses = Counter(short.values())
    return {name: name if uses[form] > 1 else form for name, form in short.items()}


def matches(pattern: str, name: str) -> bool:
    """Whether a glob fits a parameter's canonical name, with or without block number, or its module's name."""
    bare = name.partition("[")[0]
    # A block's own name reads as a character class in a glob, so it is also compared as it is.
    return pattern == name or any(fnmatchcase(n, pattern) for n in (name, bare, bare.rpartition(".")[0]))
