"""Every option of every method: the first topology difference that it makes is predicted and found."""

from __future__ import annotations

import importlib
import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from regrow import methods
from regrow.methods import BY_NAME as RECIPES
from regrow.parts.redistribution import mean_momentum
from support.paper import PAPERS, SHORT, actual, assert_same, expected, library_method

EXPLICIT = {"0.weight": 0.1, "2.weight": 0.5, "5.weight": 0.75}

START = 0
FIRST, SECOND, FOURTH = 3, 6, 12

Changes = list[tuple[Any, ...]]
"""(options, the step after which topologies differ, options that both runs have)"""

MANY = {"density": 0.7, "fraction": 0.9}

DENSITY: Changes = [({"density": 0.5}, START), ({"density": None, "allocate": EXPLICIT}, START)]
TIMES: dict[str, Changes] = {
    "interval": [({"interval": 4}, FIRST), ({"interval": 6}, FIRST)],
    "begin": [({"begin": 1}, 1), ({"begin": 5}, FIRST), ({"begin": 6}, FIRST)],
}
SHARED: dict[str, Changes] = {
    "density": DENSITY,
    **TIMES,
    "fraction": [({"fraction": 0.7}, FIRST), ({"fraction": 0.0}, FIRST), ({"fraction": 1.0}, FIRST)],
}

CASES: dict[str, dict[str, Changes]] = {
    "dense": {},
    "static": {
        "density": DENSITY,
        "allocate": [({"allocate": "uniform"}, START)],
    },
    "set": SHARED
    | {
        "begin": [({"begin": 5}, FIRST), ({"begin": 6}, FIRST, {"anneal": "cosine"})],
        "until": [({"until": 12}, FOURTH), ({"until": 7}, 9)],
        "anneal": [({"anneal": "cosine"}, FIRST), ({"anneal": "linear"}, FIRST), ({"anneal": "inverse_power"}, FIRST)],
        "drop": [({"drop": "per_sign"}, FIRST)],
        "allocate": [({"allocate": "uniform"}, START)],
        "regrow_dropped": [({"regrow_dropped": "forbid"}, FIRST), ({"regrow_dropped": "reset"}, SECOND, MANY)],
        "timing": [({"timing": "instead"}, FIRST)],
    },
    "snfs": SHARED
    | {
        "until": [({"until": 40}, FIRST), ({"until": 7}, FIRST)],
        "anneal": [({"anneal": "constant"}, FIRST), ({"anneal": "linear"}, FIRST)],
        "decay": [({"decay": 0.0}, FIRST), ({"decay": 0.5}, FIRST)],
        "redistribute": [({"redistribute": r}, FIRST) for r in (None, "magnitude", "nonzeros")],
        "allocate": [({"allocate": "erk"}, START)],
        "regrow_dropped": [({"regrow_dropped": "forbid"}, FIRST), ({"regrow_dropped": "reset"}, SECOND)],
        "timing": [({"timing": "instead"}, FIRST)],
    },
    "snip": {
        "density": [({"density": 0.5}, 1), ({"density": None, "allocate": EXPLICIT}, 1)],
        "allocate": [({"allocate": "uniform"}, 1), ({"allocate": "erk"}, 1)],
    },
    "gmp": TIMES
    | {
        "begin": [({"begin": 1}, FIRST), ({"begin": 5}, FIRST)],
        "density": [({"density": 0.5}, FIRST)],
        "until": [({"until": 7}, FIRST), ({"until": 40}, FIRST)],
        "allocate": [({"allocate": "erk"}, FIRST), ({"allocate": "globally"}, FIRST)],
        "timing": [({"timing": "instead"}, FIRST)],
    },
    "rigl": SHARED
    | {
        "until": [({"until": 40}, SECOND), ({"until": 5}, FIRST)],
        "anneal": [({"anneal": "constant"}, FIRST), ({"anneal": "inverse_power"}, FIRST)],
        "allocate": [({"allocate": "er"}, START), ({"allocate": "uniform"}, START)],
        "regrow_dropped": [({"regrow_dropped": "forbid"}, FIRST), ({"regrow_dropped": "reset"}, SECOND)],
        "timing": [({"timing": "after"}, FIRST)],
    },
    "dst": SHARED
    | {
        "until": [({"until": 40}, FIRST), ({"until": 5}, FIRST)],
        "anneal": [({"anneal": "constant"}, FIRST), ({"anneal": "inverse_power"}, FIRST)],
        "drop": [({"drop": "per_sign"}, FIRST)],
        "grow": [({"grow": "random"}, FIRST), ({"grow": "momentum"}, FIRST)],
        "redistribute": [
            ({"redistribute": "momentum"}, FIRST),
            ({"redistribute": "magnitude"}, SECOND),
            ({"redistribute": "nonzeros"}, FIRST, {"redistribute": "momentum"}),
        ],
        "decay": [({"decay": 0.0}, FIRST, {"grow": "momentum"}), ({"decay": 0.5}, FIRST, {"redistribute": "momentum"})],
        "allocate": [({"allocate": "er"}, START), ({"allocate": "uniform"}, START)],
        "regrow_dropped": [({"regrow_dropped": "forbid"}, FIRST), ({"regrow_dropped": "reset"}, SECOND)],
        "timing": [({"timing": "instead"}, FIRST)],
    },
}

FAMILIES = [
    importlib.import_module(f"methods.{path.stem}") for path in (Path(__file__).parent / "methods").glob("test_*.py")
]
"""Test modules of methods that have oracles of their own, with `SHORT` (method -> small options) and `CASES`."""

ALL_CASES: dict[str, dict[str, Any]] = CASES | {n: c for m in FAMILIES for n, c in getattr(m, "CASES", {}).items()}
ALL_SHORT: dict[str, dict[str, Any]] = SHORT | {n: c for m in FAMILIES for n, c in getattr(m, "SHORT", {}).items()}

FLAT = [
    pytest.param(name, *case, *[{}] * (3 - len(case)), id=f"{name}-{'-'.join(f'{k}={v}' for k, v in case[0].items())}")
    for name, options in CASES.items()
    for changes in options.values()
    for case in changes
]


@pytest.mark.parametrize("name", RECIPES)
def test_every_option_has_a_case(name: str) -> None:
    """Property 48: an option without an oracle makes this fail."""
    assert set(ALL_CASES[name]) == set(inspect.signature(RECIPES[name]).parameters)
    for option, changes in ALL_CASES[name].items():
        assert changes
        assert all(option in case[0] for case in changes)


@pytest.mark.parametrize(("name", "change", "first", "both"), FLAT)
def test_an_option_makes_the_difference_that_is_predicted(
    name: str, change: dict[str, Any], first: int, both: dict[str, Any]
) -> None:
    """Property 48: the default and the changed run part at a known step, and the library does both."""
    plain, changed = SHORT[name] | both, SHORT[name] | both | change
    default, other = (expected(replace(PAPERS[name], **options), "conv") for options in (plain, changed))
    found = actual(library_method(name, changed), "conv")
    assert default.first_difference(other) == first
    assert found.first_difference(default) == first
    assert_same(found, other)


@pytest.mark.parametrize("name", PAPERS)
def test_what_is_not_given_is_the_paper_s(name: str) -> None:
    """Property 48: a default is an option value too."""
    defaults = {
        k: p.default for k, p in inspect.signature(RECIPES[name]).parameters.items() if p.default is not p.empty
    }
    wanted = PAPERS[name] if name != "gmp" else replace(PAPERS[name], interval=1000, begin=0)
    for option in set(defaults) & {"begin", "interval", "fraction", "decay", "regrow_dropped", "timing"}:
        # None is "what the method's parts say" of an option that they may not have.
        assert defaults[option] in (getattr(wanted, option), None), option
    assert_same(actual(library_method(name, SHORT[name])), expected(replace(PAPERS[name], **SHORT[name])))


DYNAMIC = ["set", "snfs", "rigl", "dst"]

REFUSED: list[tuple[list[str], dict[str, Any], str]] = [
    (["static", "snip", "gmp", *DYNAMIC], {"density": 0.0}, r"density must lie in \(0, 1\], got 0"),
    (["static", "snip", "gmp", *DYNAMIC], {"density": 1.5}, r"density must lie in \(0, 1\], got 1.5"),
    (["static", "snip", "gmp", *DYNAMIC], {"density": float("nan")}, r"density must lie in \(0, 1\], got nan"),
    (DYNAMIC, {"fraction": -0.1}, r"the drop fraction must lie in \[0, 1\], got -0.1"),
    (DYNAMIC, {"fraction": 1.1}, r"the drop fraction must lie in \[0, 1\], got 1.1"),
    (DYNAMIC, {"regrow_dropped": "yes"}, "regrow_dropped must be one of keep, reset, forbid, got 'yes'"),
    (["gmp", *DYNAMIC], {"timing": "before"}, "timing must be one of instead, after, got 'before'"),
    (["snfs"], {"decay": 1.0}, r"decay must lie in \[0, 1\), got 1"),
    (["snfs"], {"decay": -0.1}, r"decay must lie in \[0, 1\), got -0.1"),
    (["dst"], {"decay": 0.5}, "decay is of a running mean of gradients, which neither .* reads: leave out 0.5"),
    (["dst"], {"decay": 1.0, "redistribute": mean_momentum}, r"decay must lie in \[0, 1\), got 1"),
]


@pytest.mark.parametrize(
    ("name", "change", "told"), [(name, change, told) for names, change, told in REFUSED for name in names]
)
def test_a_wrong_value_is_refused_by_name(name: str, change: dict[str, Any], told: str) -> None:
    """Property 48."""
    with pytest.raises(ValueError, match=f"^{name}: {told}"):
        RECIPES[name](**(SHORT[name] | change))


@pytest.mark.parametrize("name", ["gmp", *DYNAMIC])
@pytest.mark.parametrize(
    "change", [{"until": 3}, {"until": -1}, {"interval": 0}, {"begin": -2}, {"begin": 13}], ids=str
)
def test_times_at_which_nothing_happens_are_refused(name: str, change: dict[str, int]) -> None:
    """Property 48."""
    with pytest.raises(ValueError, match=r"begin|until|interval"):
        RECIPES[name](**(SHORT[name] | change))


@pytest.mark.parametrize("name", RECIPES)
def test_an_unknown_option_is_refused(name: str) -> None:
    """Property 48."""
    with pytest.raises(TypeError, match="unexpected keyword argument 'sparsity'"):
        RECIPES[name](**ALL_SHORT[name], sparsity=0.9)


@pytest.mark.parametrize("name", DYNAMIC)
def test_a_dynamic_method_requires_until(name: str) -> None:
    with pytest.raises(TypeError, match="required keyword-only argument: 'until'"):
        RECIPES[name](0.1)


def test_the_table_has_every_recipe_by_its_name() -> None:
    assert all(library_method(name, ALL_SHORT[name]).name == name for name in RECIPES)
    assert methods.BY_NAME.keys() == ALL_SHORT.keys() == ALL_CASES.keys()
