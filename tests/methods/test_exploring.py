"""SET-ITOP and RigL-ITOP against plain NumPy runs with a record of what was ever active."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest

import regrow
from regrow.core.method import Need
from regrow.methods import RECIPES
from regrow.parts import growth
from support.cases import EXPLICIT, Changes, cases, require_predicted_difference
from support.paper import (
    Array,
    Arrays,
    History,
    Program,
    actual,
    annealed,
    assert_same,
    counts_of,
    exchange,
    history,
    library,
    network,
    regular,
    sgd,
    start,
    stream,
    top,
)

PAPERS: dict[str, dict[str, Any]] = {
    "itop_set": {
        "begin": None,
        "interval": 1500,
        "fraction": 0.5,
        "anneal": "cosine",
        "grow": "random",
        "allocate": "erk",
        "regrow_dropped": "keep",
        "timing": "after",
    },
}
PAPERS["itop_rigl"] = PAPERS["itop_set"] | {"interval": 4000, "grow": "gradient"}

SHORT: dict[str, dict[str, Any]] = {name: {"density": 0.3, "until": 16, "interval": 3} for name in PAPERS}


def paper(name: str, options: dict[str, Any], kind: str, seed: int) -> History:
    return itop_run(PAPERS[name] | options, kind, seed)


def itop_run(o: dict[str, Any], kind: str, seed: int) -> History:
    fired: Arrays = {}

    def update(run: Program, g: Arrays) -> None:
        def pick(n: str, free: Array, k: int) -> Array:
            return PICKS[o["grow"]](run, n, np.abs(g[n]), fired[n], free, k)

        exchange(run, annealed(o, run.step), o["regrow_dropped"], pick)
        for n in run.sparse:
            fired[n] = fired[n] | run.mask[n]

    run = start(kind, seed, lambda run: counts_of(run, o), o["regrow_dropped"])
    fired |= {n: m.copy() for n, m in run.mask.items()}
    return history(run, kind, lambda step: regular(o, step), update, o["timing"])


def at_random(run: Program, n: str, g: Array, fired: Array, free: Array, k: int) -> Array:
    return free[stream(run, n).subset(free.size, k)]


def by_gradient(run: Program, n: str, g: Array, fired: Array, free: Array, k: int) -> Array:
    return top(g, k, free)


def unfired_first(run: Program, n: str, g: Array, fired: Array, free: Array, k: int) -> Array:
    draws, new, old = stream(run, n), free[~fired[free]], free[fired[free]]
    if k <= new.size:
        return new[draws.subset(new.size, k)]
    draws.subset(new.size, new.size)
    return np.concatenate([new, old[draws.subset(old.size, k - new.size)]])


def two_fifths_by_gradient(run: Program, n: str, g: Array, fired: Array, free: Array, k: int) -> Array:
    some = top(g, int(np.floor(0.4 * k + 1e-9)), free)
    return np.concatenate([some, unfired_first(run, n, g, fired, np.setdiff1d(free, some), k - some.size)])


def per_neuron(run: Program, n: str, g: Array, fired: Array, free: Array, k: int) -> Array:
    """Largest remainders of the neurons' mean gradients, those that are full out of the game."""
    neurons = run.shapes[n][0]
    if k == free.size:
        return free
    of = np.arange(g.size) // (g.size // neurons)
    room = np.bincount(of[free], minlength=neurons)
    quota, left, open_ = np.zeros(neurons), float(k), np.ones(neurons, bool)
    mean = np.bincount(of, g) / (g.size // neurons)
    while True:
        exact = np.where(open_, left * mean / mean[open_].sum(), 0)
        full = open_ & (exact >= room)
        if not full.any():
            quota[open_] = exact[open_]
            break
        quota[full], left, open_ = room[full], left - room[full].sum(), open_ & ~full
    whole = np.floor(quota + 1e-9).astype(int)
    for i in np.argsort(whole - quota, kind="stable")[: k - whole.sum()]:
        whole[i] += 1
    return np.concatenate([top(g, whole[i], free[of[free] == i]) for i in range(neurons)])


PICKS = {
    "random": at_random,
    "gradient": by_gradient,
    "unexplored_first": unfired_first,
    "mixed": two_fifths_by_gradient,
    "per_neuron": per_neuron,
}

RUNS: list[tuple[str, dict[str, Any]]] = [
    ("itop_set", {}),
    ("itop_rigl", {}),
    *(("itop_set", {"grow": g, "anneal": "cosine_to_0.005"}) for g in PICKS),
    *(
        ("itop_rigl", {"grow": g, "density": 0.45, "fraction": 0.8, "anneal": "constant", "regrow_dropped": "reset"})
        for g in PICKS
    ),
    *(
        ("itop_set", {"grow": g, "density": 0.6, "fraction": 0.6, "regrow_dropped": "forbid", "timing": "instead"})
        for g in PICKS
    ),
    ("itop_rigl", {"allocate": "uniform", "begin": 1, "interval": 2}),
]


@pytest.mark.parametrize("kind", ["mlp", "conv"])
@pytest.mark.parametrize(("name", "options"), RUNS, ids=str)
def test_a_run_is_that_of_the_paper(name: str, options: dict[str, Any], kind: str) -> None:
    """Properties 1, 11 and 33: topologies, values and momentum over a whole run, with every growth."""
    options = SHORT[name] | options
    for seed in range(3):
        assert_same(actual(library(name, options), kind, seed), paper(name, options, kind, seed))


COMMON: dict[str, Changes] = {
    "density": [({"density": 0.5}, 0), ({"density": None, "allocate": EXPLICIT}, 0)],
    "until": [({"until": 12}, 12, {"anneal": "constant"}), ({"until": 40}, 3)],
    "begin": [({"begin": 1}, 1), ({"begin": 5}, 3)],
    "interval": [({"interval": 4}, 3), ({"interval": 2}, 2)],
    "fraction": [({"fraction": 0.7}, 3), ({"fraction": 0.0}, 3), ({"fraction": 1.0}, 3)],
    "anneal": [({"anneal": a}, 3) for a in ("constant", "linear", "inverse_power")],
    "allocate": [({"allocate": "uniform"}, 0), ({"allocate": "er"}, 0)],
    "regrow_dropped": [({"regrow_dropped": "forbid"}, 3), ({"regrow_dropped": "reset"}, 6)],
}
CASES: dict[str, dict[str, Changes]] = {
    "itop_set": COMMON
    | {"grow": [({"grow": g}, 3) for g in PICKS if g != "random"], "timing": [({"timing": "instead"}, 6)]},
    "itop_rigl": COMMON
    | {"grow": [({"grow": g}, 3) for g in PICKS if g != "gradient"], "timing": [({"timing": "instead"}, 9)]},
}


@pytest.mark.parametrize(("name", "change", "first", "both"), cases(CASES))
def test_an_option_makes_the_difference_that_is_predicted(
    name: str, change: dict[str, Any], first: int, both: dict[str, Any]
) -> None:
    """Property 48."""
    require_predicted_difference(name, paper, SHORT[name], change, first, both)


@pytest.mark.parametrize("name", PAPERS)
def test_what_is_not_given_is_the_papers(name: str) -> None:
    """Property 48: a default is an option value too."""
    given = inspect.signature(RECIPES[name]).parameters
    for option in set(PAPERS[name]) - {"anneal", "grow", "allocate"}:
        assert given[option].default == PAPERS[name][option], option
    assert_same(actual(library(name, SHORT[name])), paper(name, SHORT[name], "mlp", 0))


@pytest.mark.parametrize("name", PAPERS)
def test_needs_follow_from_the_growth(name: str) -> None:
    needs = {g: library(name, SHORT[name] | {"grow": g}).needs for g in PICKS}
    assert needs["random"] == needs["unexplored_first"] == Need.EXPLORED
    assert needs["gradient"] == needs["mixed"] == needs["per_neuron"] == Need.EXPLORED | Need.GRADIENT


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"density": 0.0}, r"density must lie in \(0, 1\], got 0"),
    ({"fraction": -0.1}, r"the drop fraction must lie in \[0, 1\], got -0.1"),
    ({"regrow_dropped": "yes"}, "regrow_dropped must be one of keep, reset, forbid, got 'yes'"),
    ({"timing": "before"}, "timing must be one of instead, after, got 'before'"),
    ({"grow": growth.by_momentum}, "this growth reads a running mean of gradients"),
    ({"grow": growth.by_momentum_per_neuron}, "this growth reads a running mean of gradients"),
    ({"grow": growth.mixed(growth.at_random, growth.by_momentum, 0.5)}, "this growth reads a running mean"),
]


@pytest.mark.parametrize(("change", "told"), REFUSED, ids=lambda v: v if isinstance(v, str) else "-".join(v))
@pytest.mark.parametrize("name", PAPERS)
def test_a_wrong_value_is_refused_by_name(name: str, change: dict[str, Any], told: str) -> None:
    """Property 48; bug 8: growth by a momentum that nobody keeps is refused, not random."""
    with pytest.raises(ValueError, match=f"^{name}: {told}"):
        RECIPES[name](**(SHORT[name] | change))


@pytest.mark.parametrize("name", PAPERS)
@pytest.mark.parametrize("change", [{"until": 3}, {"interval": 0}, {"begin": -2}, {"begin": 16}], ids=str)
def test_times_at_which_nothing_happens_are_refused(name: str, change: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"begin|until|interval"):
        RECIPES[name](**(SHORT[name] | change))


def test_compressed_storage_refuses_the_record_unless_asked() -> None:
    model = network("mlp", 0)
    with pytest.raises(ValueError, match=r"itop_set keeps a record of every position, .* allow_dense=True"):
        regrow.sparsify(model, sgd(model), RECIPES["itop_set"](**SHORT["itop_set"]), storage="compressed")
