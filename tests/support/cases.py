"""Cases of options: what an option changes, and after which step, is predicted by NumPy and found."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from support.paper import History, Options, actual, assert_same, library

EXPLICIT = {"0.weight": 0.1, "2.weight": 0.5, "5.weight": 0.75}
"""Densities of the convolutional network's weights."""

Changes = list[tuple[Any, ...]]
"""(options, the step after which topologies differ, options that both runs have)"""


def cases(table: Mapping[str, Mapping[str, Changes]]) -> list[Any]:
    """(method, changed options, step, options of both) of every case."""
    return [
        pytest.param(
            name, *case, *[{}] * (3 - len(case)), id=f"{name}-{'-'.join(f'{k}={v}' for k, v in case[0].items())}"
        )
        for name, options in table.items()
        for changes in options.values()
        for case in changes
    ]


Found = Callable[[str, Options, str], History]
"""(method, options, kind of network) -> the library's run."""


def found_by_library(name: str, options: Options, kind: str) -> History:
    return actual(library(name, options), kind)


def require_predicted_difference(
    name: str,
    paper: Callable[[str, Options, str, int], History],
    short: Options,
    change: Options,
    first: int,
    both: Options,
    kind: str = "conv",
    found: Found = found_by_library,
) -> None:
    """The paper's default and changed runs part at a known step, and the library's changed run is the paper's."""
    changed = short | both | change
    default, other = (paper(name, options, kind, 0) for options in (short | both, changed))
    assert default.first_difference(other) == first
    assert_same(found(name, changed, kind), other)


def tables(name: str) -> dict[str, Any]:
    """`SHORT` or `CASES` of all test modules of methods: what each says of its own methods, by method."""
    tests = Path(__file__).parents[1]
    paths = sorted((tests / "methods").rglob("test_*.py"))
    modules = [importlib.import_module(".".join(path.relative_to(tests).with_suffix("").parts)) for path in paths]
    return {method: row for module in modules for method, row in getattr(module, name, {}).items()}
