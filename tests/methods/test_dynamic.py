"""RigL, SET, SNFS, DST and ITOP against plain NumPy runs: one program, since they are one composition."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

import regrow
from regrow.core.method import Need
from regrow.methods import BY_NAME
from regrow.parts import at_random, by_gradient, mean_momentum
from support.cases import EXPLICIT, Changes, cases, require_predicted_difference
from support.dynamics import DROPS, GROWTHS, PLAIN, dynamic_run
from support.paper import History, actual, assert_same, library, meant, network, sgd

RIGL: dict[str, Any] = PLAIN | {
    "begin": None,
    "interval": 100,
    "fraction": 0.3,
    "anneal": "cosine",
    "grow": "gradient",
    "allocate": "erk",
    "regrow_dropped": "keep",
    "timing": "instead",
}
DST = RIGL | {"timing": "after"}
PAPERS: dict[str, dict[str, Any]] = {
    "rigl": RIGL,
    "set": DST | {"anneal": "constant", "grow": "random", "allocate": "er"},
    "snfs": DST | {"fraction": 0.5, "grow": "momentum", "redistribute": "momentum", "allocate": "uniform"},
    "dst": DST,
    "itop_set": DST | {"fraction": 0.5, "interval": 1500, "grow": "random"},
    "itop_rigl": DST | {"fraction": 0.5, "interval": 4000},
}
"""What the papers say, under the names of the options."""

ITOP = ["itop_set", "itop_rigl"]
SHORT: dict[str, dict[str, Any]] = {
    name: {"density": 0.3, "until": 16 if name in ITOP else 13, "interval": 3} for name in PAPERS
}


def paper(name: str, options: dict[str, Any], kind: str, seed: int) -> History:
    return dynamic_run(PAPERS[name] | options, kind, seed)


RUNS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in PAPERS),
    *((name, {"drop": "taylor", "grow": "mixed", "redistribute": "survivors", "density": 0.5}) for name in PAPERS),
    ("rigl", {"timing": "after"}),
    ("rigl", {"density": 0.8, "fraction": 0.9, "anneal": "constant", "regrow_dropped": "forbid"}),
    ("rigl", {"anneal": "linear", "regrow_dropped": "reset", "fraction": 0.7}),
    ("rigl", {"interval": 1, "begin": 2, "allocate": "uniform"}),
    *(("rigl", {"drop": d, "redistribute": r}) for d in DROPS for r in ("magnitude", "momentum")),
    ("set", {"drop": "per_sign"}),
    ("set", {"timing": "instead", "anneal": "cosine"}),
    ("set", {"drop": "global", "redistribute": "nonzeros", "timing": "instead"}),
    ("set", {"grow": "momentum", "decay": 0.5, "density": 0.8, "redistribute": "momentum"}),
    ("snfs", {"redistribute": "magnitude"}),
    ("snfs", {"redistribute": "nonzeros", "density": 0.85}),
    ("snfs", {"redistribute": "momentum", "density": 0.85}),
    ("snfs", {"redistribute": None}),
    ("snfs", {"decay": 0.5, "timing": "instead"}),
    ("snfs", {"drop": "per_sign", "grow": "gradient", "decay": 0.0, "regrow_dropped": "reset"}),
    ("dst", {"grow": "momentum", "decay": 0.5, "drop": "per_sign"}),
    ("dst", {"grow": "random", "redistribute": "momentum", "density": 0.85}),
    *(("itop_set", {"grow": g, "anneal": "cosine_to_0.005"}) for g in GROWTHS),
    *(
        ("itop_rigl", {"grow": g, "density": 0.45, "fraction": 0.8, "anneal": "constant", "regrow_dropped": "reset"})
        for g in GROWTHS
    ),
    *(
        ("itop_set", {"grow": g, "density": 0.6, "fraction": 0.6, "regrow_dropped": "forbid", "timing": "instead"})
        for g in GROWTHS
    ),
    ("itop_rigl", {"allocate": "uniform", "begin": 1, "interval": 2}),
    *((name, {"structure": "fives", "density": 0.5, "redistribute": None}) for name in PAPERS),
    ("rigl", {"structure": "tiles", "density": 0.6, "fraction": 0.7, "regrow_dropped": "reset"}),
    ("set", {"structure": "fives", "density": 0.6, "fraction": 0.7, "regrow_dropped": "forbid"}),
    ("dst", {"structure": "rows", "density": 0.7, "drop": "taylor", "grow": "mixed", "allocate": "uniform"}),
]


@pytest.mark.parametrize("kind", ["mlp", "conv"])
@pytest.mark.parametrize(("name", "options"), RUNS, ids=str)
def test_a_run_is_that_of_the_paper(name: str, options: dict[str, Any], kind: str) -> None:
    """Properties 1, 9, 10, 11, 24, 26, 27, 29, 33 and 34: topologies, values and momentum over a whole run."""
    options = SHORT[name] | options
    for seed in range(3):
        assert_same(actual(library(name, options), kind, seed), paper(name, options, kind, seed))


@pytest.mark.parametrize(
    "options", [{"redistribute": "survivors", "drop": "global"}, {"redistribute": "momentum"}], ids=str
)
@pytest.mark.parametrize("name", ["snfs", "rigl"])
def test_units_of_one_size_move_between_weights(name: str, options: dict[str, Any]) -> None:
    """Properties 26 and 27, counted in units."""
    options = SHORT[name] | {"structure": "fours", "density": 0.5} | options
    for seed in range(3):
        assert_same(actual(library(name, options), "fours", seed), paper(name, options, "fours", seed))


MANY = {"density": 0.7, "fraction": 0.9}


def shared(name: str) -> dict[str, Changes]:
    """Cases of the options of all, each with values that differ from the recipe's own."""
    own = PAPERS[name]
    mean = {} if name == "snfs" else {"grow": "momentum"}
    moved, late = {"redistribute": "magnitude"}, 6 if name in ("rigl", "dst") else 3
    return {
        "density": [({"density": 0.5}, 0), ({"density": None, "allocate": EXPLICIT}, 0)],
        "begin": [({"begin": 1}, 1), ({"begin": 5}, 3)],
        "interval": [({"interval": 4}, 3), ({"interval": 6}, 3), ({"interval": 2}, 2)],
        "fraction": [({"fraction": 0.7}, 3), ({"fraction": 0.0}, 3), ({"fraction": 1.0}, 3)],
        "anneal": [({"anneal": a}, 3) for a in ("constant", "linear", "cosine", "inverse_power") if a != own["anneal"]],
        "drop": [({"drop": d}, 3) for d in ("per_sign", "taylor", "global")],
        "grow": [({"grow": g}, 3) for g in GROWTHS if g != own["grow"]],
        "redistribute": [
            *(({"redistribute": r}, 3) for r in ("momentum", None) if r != own["redistribute"]),
            ({"redistribute": "magnitude"}, late),
            *(({"redistribute": r}, late, moved) for r in ("nonzeros", "survivors")),
        ],
        "decay": [({"decay": d}, 3, mean) for d in (0.0, 0.5)],
        "allocate": [({"allocate": a}, 0) for a in ("uniform", "er", "erk") if a != own["allocate"]],
        "regrow_dropped": [({"regrow_dropped": "forbid"}, 3), ({"regrow_dropped": "reset"}, 6, MANY)],
        "structure": [({"structure": s}, 0, {"redistribute": None}) for s in ("fives", "tiles")],
    }


ALONE: dict[str, dict[str, Changes]] = {
    "rigl": {
        "until": [({"until": 12}, 6), ({"until": 40}, 6), ({"until": 5}, 3)],
        "begin": [({"begin": 6}, 3)],
        "regrow_dropped": [({"regrow_dropped": "reset"}, 6)],
        "timing": [({"timing": "after"}, 3)],
    },
    "set": {
        "until": [({"until": 12}, 12), ({"until": 7}, 9)],
        "begin": [({"begin": 6}, 3, {"anneal": "cosine"})],
        "timing": [({"timing": "instead"}, 3)],
    },
    "snfs": {
        "until": [({"until": 12}, 6), ({"until": 40}, 3), ({"until": 7}, 3)],
        "begin": [({"begin": 6}, 3)],
        "redistribute": [({"redistribute": "nonzeros"}, 3)],
        "regrow_dropped": [({"regrow_dropped": "reset"}, 6)],
        "timing": [({"timing": "instead"}, 3)],
    },
    "dst": {
        "until": [({"until": 12}, 6), ({"until": 40}, 3), ({"until": 5}, 3)],
        "begin": [({"begin": 6}, 3)],
        "redistribute": [({"redistribute": "nonzeros"}, 3, {"redistribute": "momentum"})],
        "decay": [({"decay": 0.5}, 3, {"redistribute": "momentum"})],
        "regrow_dropped": [({"regrow_dropped": "reset"}, 6)],
        "timing": [({"timing": "instead"}, 3)],
    },
    "itop_set": {
        "until": [({"until": 12}, 3), ({"until": 12}, 12, {"anneal": "constant"}), ({"until": 40}, 3)],
        "regrow_dropped": [({"regrow_dropped": "reset"}, 6)],
        "timing": [({"timing": "instead"}, 6)],
    },
    "itop_rigl": {
        "until": [({"until": 12}, 3), ({"until": 12}, 12, {"anneal": "constant"}), ({"until": 40}, 3)],
        "regrow_dropped": [({"regrow_dropped": "reset"}, 6)],
        "timing": [({"timing": "instead"}, 9)],
    },
}
"""Cases of a method alone, most often as their first difference comes later."""

CASES: dict[str, dict[str, Changes]] = {
    name: {o: [*shared(name).get(o, []), *ALONE[name].get(o, [])] for o in (*shared(name), "until", "timing")}
    for name in PAPERS
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
    given = inspect.signature(BY_NAME[name]).parameters
    for option, word in PAPERS[name].items():
        assert given[option].default == meant(option, word), option
    assert_same(actual(library(name, SHORT[name])), paper(name, SHORT[name], "mlp", 0))


@pytest.mark.parametrize("name", PAPERS)
def test_needs_follow_from_the_parts(name: str) -> None:
    record = Need.EXPLORED if name in ITOP else Need.NOTHING
    reads = {"random": Need.NOTHING, "gradient": Need.GRADIENT, "per_neuron": Need.GRADIENT}
    reads |= {
        "unexplored_first": Need.EXPLORED,
        "mixed": Need.EXPLORED | Need.GRADIENT,
        "momentum": Need.EVERY_GRADIENT,
    }
    for grow, need in reads.items():
        method = library(name, SHORT[name] | {"grow": grow, "redistribute": None})
        assert method.needs == record | need
        assert (method.observe is not None) == (grow == "momentum")
    method = library(name, SHORT[name] | {"grow": "random", "redistribute": "momentum"})
    assert method.needs == record | Need.EVERY_GRADIENT | Need.ROOM
    assert method.observe is not None
    method = library(name, SHORT[name] | {"grow": "random", "redistribute": "survivors"})
    assert (method.needs, method.observe) == (record | Need.ROOM, None)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"density": 0.0}, r"density must lie in \(0, 1\], got 0"),
    ({"density": 1.5}, r"density must lie in \(0, 1\], got 1.5"),
    ({"density": float("nan")}, r"density must lie in \(0, 1\], got nan"),
    ({"fraction": -0.1}, r"the drop fraction must lie in \[0, 1\], got -0.1"),
    ({"fraction": 1.1}, r"the drop fraction must lie in \[0, 1\], got 1.1"),
    ({"regrow_dropped": "yes"}, "regrow_dropped must be one of keep, reset, forbid, got 'yes'"),
    ({"timing": "before"}, "timing must be one of instead, after, got 'before'"),
    ({"decay": 0.5, "grow": at_random, "redistribute": None}, "decay is of a running mean .* reads: leave out 0.5"),
    (
        {"decay": 0.5, "grow": by_gradient, "redistribute": None},
        "decay is of a running mean of gradients, which neither .* reads: leave out 0.5",
    ),
    ({"decay": 1.0, "redistribute": mean_momentum}, r"decay must lie in \[0, 1\), got 1"),
    ({"decay": -0.1, "redistribute": mean_momentum}, r"decay must lie in \[0, 1\), got -0.1"),
]


@pytest.mark.parametrize(("change", "told"), REFUSED, ids=lambda v: v if isinstance(v, str) else "-".join(v))
@pytest.mark.parametrize("name", PAPERS)
def test_a_wrong_value_is_refused_by_name(name: str, change: dict[str, Any], told: str) -> None:
    """Property 48; bug 8: a decay that nothing reads is refused, not ignored."""
    with pytest.raises(ValueError, match=f"^{name}: {told}"):
        BY_NAME[name](**(SHORT[name] | change))


@pytest.mark.parametrize("name", PAPERS)
@pytest.mark.parametrize(
    "change", [{"until": 3}, {"until": -1}, {"interval": 0}, {"begin": -2}, {"begin": 16}], ids=str
)
def test_times_at_which_nothing_happens_are_refused(name: str, change: dict[str, int]) -> None:
    """Property 48."""
    with pytest.raises(ValueError, match=r"begin|until|interval"):
        BY_NAME[name](**(SHORT[name] | change))


@pytest.mark.parametrize("name", PAPERS)
def test_a_begin_at_until_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"begin|until"):
        BY_NAME[name](**(SHORT[name] | {"begin": SHORT[name]["until"]}))


@pytest.mark.parametrize("name", PAPERS)
def test_a_dynamic_method_requires_until(name: str) -> None:
    with pytest.raises(TypeError, match="required keyword-only argument: 'until'"):
        BY_NAME[name](0.1)


def test_compressed_storage_refuses_the_record_unless_asked() -> None:
    model = network("mlp", 0)
    with pytest.raises(ValueError, match=r"itop_set keeps a record of every position, .* allow_dense=True"):
        regrow.sparsify(model, sgd(model), BY_NAME["itop_set"](**SHORT["itop_set"]), storage="compressed")
