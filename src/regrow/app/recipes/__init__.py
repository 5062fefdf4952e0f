"""Published settings by name: one TOML file each, whose step counts shrink with the run."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from importlib import resources
from typing import Any

STEP_COUNTS = frozenset({"interval", "begin", "until", "prune_until", "warmup", "rewind_to"})
"""Options counted in optimizer steps; in a shortened run they shrink in proportion."""


def names() -> list[str]:
    """The recipes there are."""
    files = resources.files(__name__).iterdir()
    return sorted(f.name.removesuffix(".toml") for f in files if f.name.endswith(".toml"))


def settings(name: str, *, steps: int | None, epochs: float | None) -> dict[str, Any]:
    """The options of a recipe for a run of `steps` or `epochs`, or of its own length where both are None.

    Examples:
        >>> settings("sup-tickets-rigl", steps=None, epochs=None)["interval"]
        1000
        >>> settings("sup-tickets-rigl", steps=1250, epochs=None)["interval"]
        10

    Raises:
        ValueError: for a name that there is none of.
    """
    if name not in names():
        raise ValueError(f"there is no recipe {name!r}: choose {', '.join(names())}")
    recipe = tomllib.loads((resources.files(__name__) / f"{name}.toml").read_text())
    share = 1.0
    if steps is not None:
        share = steps / recipe["steps"]
    elif epochs is not None:
        share = epochs / recipe["epochs"]
    length: Mapping[str, Any] = {} if steps is not None or epochs is not None else {"epochs": float(recipe["epochs"])}
    counts = {k: max(1, round(v * share)) for k, v in recipe["options"].items() if k in STEP_COUNTS}
    return {**recipe["options"], **counts, **length}
