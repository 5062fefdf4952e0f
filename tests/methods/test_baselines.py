"""Dense and static training against plain NumPy runs."""

from __future__ import annotations

from typing import Any

import pytest

from regrow.methods import BY_NAME
from support.cases import EXPLICIT, Changes, cases, require_predicted_difference
from support.paper import History, actual, assert_same, counts_of, history, library, start

PAPERS: dict[str, dict[str, Any]] = {"dense": {}, "static": {"allocate": "erk", "structure": None}}
SHORT: dict[str, dict[str, Any]] = {"dense": {}, "static": {"density": 0.3}}
CASES: dict[str, dict[str, Changes]] = {
    "dense": {},
    "static": {
        "density": [({"density": 0.5}, 0), ({"density": None, "allocate": EXPLICIT}, 0)],
        "allocate": [({"allocate": "uniform"}, 0)],
        "structure": [({"structure": s}, 0) for s in ("fives", "tiles", "rows")],
    },
}


def paper(name: str, options: dict[str, Any], kind: str, seed: int) -> History:
    o = PAPERS[name] | options
    counts = None if name == "dense" else lambda run: counts_of(run, o)
    run = start(kind, seed, counts, structure=o.get("structure"))
    return history(run, kind, lambda step: False, lambda run, g: None, "after")


@pytest.mark.parametrize("kind", ["mlp", "conv"])
@pytest.mark.parametrize("name", PAPERS)
def test_a_run_is_plain_training_of_what_is_active(name: str, kind: str) -> None:
    """Properties 1 and 9: topologies, values and momentum over a whole run, with the defaults."""
    for seed in range(3):
        assert_same(actual(library(name, SHORT[name]), kind, seed), paper(name, SHORT[name], kind, seed))


@pytest.mark.parametrize(("name", "change", "first", "both"), cases(CASES))
def test_an_option_makes_the_difference_that_is_predicted(
    name: str, change: dict[str, Any], first: int, both: dict[str, Any]
) -> None:
    """Property 48."""
    require_predicted_difference(name, paper, SHORT[name], change, first, both)


@pytest.mark.parametrize("density", [0.0, 1.5, float("nan")])
def test_a_wrong_density_is_refused_by_name(density: float) -> None:
    """Property 48."""
    with pytest.raises(ValueError, match=rf"^static: density must lie in \(0, 1\], got {density:g}"):
        BY_NAME["static"](density)
