"""DSR, MEST, DEEP R and GSE against plain NumPy runs written from their papers, and what is theirs alone."""

from __future__ import annotations

import inspect
import logging
import math
import tracemalloc
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import regrow
from regrow import methods
from regrow.core.draws import Stream
from regrow.core.method import Method, Need
from regrow.core.topology import Topology
from regrow.core.weight import Weights
from regrow.methods import BY_NAME
from regrow.parts import constant, explicit, mean_momentum, sampled_gradient
from support.cases import EXPLICIT, Changes, cases, require_predicted_difference
from support.dynamics import (
    DROPS,
    GROWTHS,
    Watch,
    at_random,
    counts_to_grow,
    grow,
    place,
    without_lowest,
)
from support.fakes import Fake
from support.paper import (
    BOXES,
    Array,
    Arrays,
    History,
    Options,
    Program,
    Train,
    actual,
    annealed,
    assert_same,
    batches,
    counts_of,
    floor,
    history,
    library,
    meant,
    network,
    only,
    regular,
    share_out,
    start,
    stream,
    top,
)

PAPERS: dict[str, dict[str, Any]] = {
    "dsr": {
        "begin": None,
        "interval": 100,
        "fraction": 0.1,
        "threshold": 1e-3,
        "tolerance": 0.1,
        "grow": "random",
        "redistribute": "survivors",
        "decay": None,
        "allocate": "uniform",
        "regrow_dropped": "reset",
        "timing": "after",
        "structure": None,
    },
    "mest": {
        "begin": None,
        "interval": 1000,
        "fraction": 0.2,
        "anneal": "linear",
        "gradient_weight": 1.0,
        "soft": False,
        "grow": "random",
        "redistribute": None,
        "decay": None,
        "allocate": "uniform",
        "regrow_dropped": "reset",
        "timing": "after",
        "structure": None,
    },
    "deep_r": {
        "l1": 5e-6,
        "noise": 5e-6,
        "grow": "random",
        "redistribute": None,
        "decay": None,
        "allocate": "uniform",
    },
    "gse": {
        "begin": None,
        "interval": 1000,
        "fraction": 0.2,
        "anneal": "cosine",
        "gamma": 1.0,
        "drop": "lowest",
        "redistribute": None,
        "decay": None,
        "allocate": "er",
        "regrow_dropped": "forbid",
        "timing": "after",
        "structure": None,
    },
}

PAPERS["haste"] = {
    "begin": None,
    "interval": 1000,
    "fraction": 0.15,
    "anneal": "constant",
    "drop": "lowest",
    "allocate": "uniform",
    "regrow_dropped": "reset",
    "timing": "after",
    "structure": "thirty-twos",
}

SHORT: dict[str, dict[str, Any]] = {
    "haste": {"density": 0.5, "until": 13, "interval": 3, "fraction": 0.4, "structure": "fives"},
    "dsr": {"density": 0.3, "until": 13, "interval": 3, "fraction": 0.3, "threshold": 0.06},
    "mest": {"density": 0.3, "until": 13, "interval": 3, "fraction": 0.4},
    "deep_r": {"density": 0.3, "until": 13, "l1": 1e-3, "noise": 0.01},
    "gse": {"density": 0.3, "until": 13, "interval": 3, "fraction": 0.4},
}


def dsr(run: Program, o: Options, watch: Watch) -> Train:
    threshold = [o["threshold"]]

    def update(run: Program, g: Arrays) -> None:
        kept, wanted = {}, 0
        if o["fraction"] == 0:
            return
        for n in run.sparse:
            active = run.active(n)
            wanted += floor(o["fraction"] * active.size)
            score = run.pooled(n, np.abs(run.w[n]))
            stays = active[score[active] > threshold[0]]
            kept[n] = only(run, n, stays if stays.size else top(score, 1, active))
        lost = sum(int(run.mask[n].sum() - kept[n].sum()) for n in run.sparse)
        low, high = (1 - o["tolerance"]) * wanted, (1 + o["tolerance"]) * wanted
        threshold[0] *= 2 if lost < low else 0.5 if lost > high else 1
        grow(run, g, kept, o, watch)

    return update


def mest(run: Program, o: Options, watch: Watch) -> Train:
    targets = {n: int(run.mask[n].sum()) for n in run.sparse}

    def update(run: Program, g: Arrays) -> None:
        fraction, policy = annealed(o, run.step) if run.step < o["until"] else 0.0, o["regrow_dropped"]
        score = {n: run.pooled(n, np.abs(run.w[n]) + o["gradient_weight"] * np.abs(g[n])) for n in run.sparse}
        if not o["soft"]:
            return grow(run, g, without_lowest(run, score, fraction, policy), o, watch)
        kept = {n: only(run, n, top(score[n], targets[n], run.active(n))) for n in run.sparse}
        counts = [floor(fraction * targets[n]) for n in run.sparse]
        free = [int((~(run.mask[n] if policy == "forbid" else kept[n])).sum()) for n in run.sparse]
        room = [min(targets[n], places) for n, places in zip(run.sparse, free, strict=True)]
        counts = share_out([float(c) for c in counts], min(sum(counts), sum(room)), room) if any(counts) else counts
        place(run, kept, policy, counts, GROWTHS[o["grow"]](run, g, watch))

    return update


def deep_r(run: Program, o: Options, watch: Watch) -> Train:
    signs = {n: Stream(run.seed, n, 0).signs(np.arange(run.w[n].size)).astype(float) for n in run.sparse}
    for n in run.sparse:
        run.w[n] = np.abs(run.w[n]) * signs[n]

    def update(run: Program, g: Arrays) -> None:
        draws = {n: stream(run, n) for n in run.sparse}
        kept, moved = {}, {}
        for n in run.sparse:
            active = run.active(n)
            theta = signs[n][active] * run.w[n][active] - o["l1"] + o["noise"] * draws[n].normal(active.size)
            moved[n] = np.zeros_like(run.w[n])
            moved[n][active] = signs[n][active] * theta
            kept[n] = only(run, n, active[theta >= 0])
        counts = counts_to_grow(run, kept, o["redistribute"], "reset", watch)
        run.w |= moved
        pick = GROWTHS[o["grow"]](run, g, watch)
        if o["grow"] == "random":  # The same stream as the noise, further on.
            pick = lambda n, free, count: free[draws[n].subset(free.size, count)]  # noqa: E731
        place(run, kept, "reset", counts, pick)

    return update


def gse(run: Program, o: Options, watch: Watch) -> Train:
    def update(run: Program, g: Arrays) -> None:
        policy, sizes = o["regrow_dropped"], {n: int(o["gamma"] * run.mask[n].sum()) for n in run.sparse}
        kept = DROPS[o["drop"]](run, g, annealed(o, run.step), policy)
        counts = counts_to_grow(run, kept, o["redistribute"], policy, watch)

        def pick(n: str, free: Array, count: int) -> Array:
            return top(
                run.pooled(n, np.abs(g[n])), count, at_random(run)(n, free, min(free.size, max(count, sizes[n])))
            )

        place(run, kept, policy, counts, pick)

    return update


def fan_ins(run: Program, n: str, units: Array) -> Array:
    """Units by output, (outputs, units of one)."""
    return units.reshape(-(-run.shapes[n][0] // BOXES[run.structure](run.shapes[n])[0]), -1)


def equal_fan_ins(run: Program, counts: Sequence[int]) -> None:
    for n, count in zip(run.sparse, counts, strict=True):
        rows, draws = fan_ins(run, n, np.zeros_like(run.mask[n])), stream(run, n)
        for i, row in enumerate(rows):
            row[draws.subset(row.size, (count + len(rows) - 1 - i) // len(rows))] = True
        run.mask[n] = rows.ravel()
        run.w[n] = run.w[n] * run.wide(n)


def haste(run: Program, o: Options, watch: Watch) -> Train:
    def update(run: Program, g: Arrays) -> None:
        kept = DROPS[o["drop"]](run, g, annealed(o, run.step), o["regrow_dropped"])
        for n in run.sparse:
            draws, grown = stream(run, n), fan_ins(run, n, np.zeros_like(kept[n]))
            for new, before, stays in zip(grown, fan_ins(run, n, run.mask[n]), fan_ins(run, n, kept[n]), strict=True):
                free = np.flatnonzero(~stays)
                if before.sum() > stays.sum():
                    new[free[draws.subset(free.size, int(before.sum() - stays.sum()))]] = True
            run.change(n, kept[n], grown.ravel())

    return update


UPDATES = {"dsr": dsr, "mest": mest, "deep_r": deep_r, "gse": gse, "haste": haste}


def paper(name: str, options: dict[str, Any], kind: str, seed: int) -> History:
    o = {"begin": 1, "interval": 1, "regrow_dropped": "reset", "timing": "after", "soft": False}
    o |= PAPERS[name] | options
    counts, watch = lambda run: counts_of(run, o), Watch(o.get("decay"))
    equal = name == "haste"
    run = start(kind, seed, None if equal else counts, keep=o["regrow_dropped"], structure=o.get("structure"))
    if equal:
        equal_fan_ins(run, counts(run))
    due = lambda step: regular(o, step) or (o["soft"] and step == o["until"])  # noqa: E731
    return history(run, kind, due, UPDATES[name](run, o, watch), o["timing"], watch)


RUNS: list[tuple[str, dict[str, Any]]] = [
    ("dsr", {}),
    *((name, {"structure": "fives", "density": 0.5, "redistribute": None}) for name in ("dsr", "mest", "gse")),
    ("mest", {"structure": "tiles", "density": 0.5, "soft": True}),
    ("haste", {}),
    ("haste", {"structure": None, "density": 0.3, "regrow_dropped": "keep", "allocate": "erk"}),
    ("haste", {"structure": "tiles", "drop": "taylor", "timing": "instead", "anneal": "cosine"}),
    ("dsr", {"threshold": 0.01, "tolerance": 0.0, "interval": 1}),
    ("dsr", {"threshold": 9.0, "regrow_dropped": "keep"}),
    ("dsr", {"density": 0.8, "threshold": 0.2, "allocate": "erk"}),
    ("dsr", {"regrow_dropped": "forbid", "timing": "instead", "begin": 2}),
    ("mest", {}),
    ("mest", {"gradient_weight": 0.0, "anneal": "constant"}),
    ("mest", {"gradient_weight": 30.0, "timing": "instead", "regrow_dropped": "keep"}),
    ("mest", {"density": 0.8, "fraction": 0.9, "regrow_dropped": "forbid"}),
    ("mest", {"soft": True}),
    ("mest", {"soft": True, "anneal": "constant", "fraction": 1.0, "begin": 2, "regrow_dropped": "keep"}),
    ("mest", {"soft": True, "timing": "instead", "regrow_dropped": "forbid", "allocate": "erk"}),
    ("mest", {"soft": True, "density": 0.7, "fraction": 0.9, "allocate": "erk"}),
    ("deep_r", {}),
    ("deep_r", {"l1": 0.0, "noise": 0.0, "density": 0.6}),
    ("deep_r", {"l1": 0.02, "noise": 0.1, "allocate": "erk"}),
    *(("dsr", {"grow": g, "redistribute": r}) for g, r in (("gradient", None), ("momentum", "momentum"))),
    ("mest", {"grow": "unexplored_first", "redistribute": "magnitude"}),
    ("mest", {"grow": "gradient", "soft": True}),
    ("mest", {"grow": "momentum", "decay": 0.5, "soft": True, "timing": "instead"}),
    ("deep_r", {"grow": "gradient", "redistribute": "magnitude"}),
    ("deep_r", {"grow": "momentum", "decay": 0.0, "redistribute": "survivors", "density": 0.6}),
    *(("gse", {"drop": d, "redistribute": "momentum", "regrow_dropped": "keep"}) for d in DROPS),
    ("gse", {}),
    ("gse", {"gamma": 0.5, "regrow_dropped": "keep", "timing": "instead"}),
    ("gse", {"gamma": 0.4, "regrow_dropped": "reset", "anneal": "constant"}),
    ("gse", {"density": 0.8, "fraction": 0.9, "interval": 1, "begin": 2, "gamma": 100.0}),
]


@pytest.mark.parametrize("kind", ["mlp", "conv"])
@pytest.mark.parametrize(("name", "options"), RUNS, ids=lambda v: v if isinstance(v, str) else "-".join(map(str, v)))
def test_a_run_is_that_of_the_paper(name: str, options: dict[str, Any], kind: str) -> None:
    """Properties 1, 3, 4, 7, 9, 10, 11, 24, 27 and 29: topologies, values and momentum over a whole run."""
    options = SHORT[name] | options
    for seed in range(3):
        assert_same(actual(library(name, options), kind, seed), paper(name, options, kind, seed))


DENSITY: Changes = [({"density": 0.5}, 0), ({"density": None, "allocate": EXPLICIT}, 0)]
TIMES: dict[str, Changes] = {
    "interval": [({"interval": 4}, 3), ({"interval": 6}, 3)],
    "begin": [({"begin": 1}, 1), ({"begin": 5}, 3)],
}
FRACTION: Changes = [({"fraction": 0.7}, 3), ({"fraction": 0.0}, 3), ({"fraction": 0.8}, 3)]
MANY = {"density": 0.6, "fraction": 0.9}

CASES: dict[str, dict[str, Changes]] = {
    "dsr": {
        "density": DENSITY,
        **TIMES,
        "until": [({"until": 12}, 12), ({"until": 7}, 9)],
        "fraction": [({"fraction": 0.8}, 9), ({"fraction": 0.05}, 6), ({"fraction": 0.0}, 3)],
        "threshold": [({"threshold": 0.02}, 3), ({"threshold": 0.2}, 3)],
        "tolerance": [({"tolerance": 0.95}, 6)],
        "grow": [({"grow": "gradient"}, 3), ({"grow": "momentum"}, 3)],
        "redistribute": [({"redistribute": None}, 3), ({"redistribute": "momentum"}, 3)],
        "decay": [({"decay": 0.0}, 3, {"grow": "momentum"})],
        "allocate": [({"allocate": "erk"}, 0)],
        "regrow_dropped": [({"regrow_dropped": "forbid"}, 3), ({"regrow_dropped": "keep"}, 9, MANY)],
        "structure": [({"structure": s}, 0, {"redistribute": None}) for s in ("fives", "tiles")],
        "timing": [({"timing": "instead"}, 6)],
    },
    "mest": {
        "density": DENSITY,
        **TIMES,
        "until": [({"until": 40}, 3), ({"until": 4}, 3)],
        "fraction": FRACTION,
        "anneal": [({"anneal": "constant"}, 3), ({"anneal": "inverse_power"}, 3), ({"anneal": "cosine"}, 3)],
        "gradient_weight": [({"gradient_weight": 0.0}, 6), ({"gradient_weight": 100.0}, 3)],
        "soft": [({"soft": True}, 3)],
        "grow": [({"grow": "gradient"}, 3), ({"grow": "momentum"}, 3)],
        "redistribute": [({"redistribute": "magnitude"}, 3), ({"redistribute": "momentum"}, 3)],
        "decay": [({"decay": 0.0}, 3, {"grow": "momentum"})],
        "allocate": [({"allocate": "erk"}, 0)],
        "regrow_dropped": [({"regrow_dropped": "forbid"}, 3), ({"regrow_dropped": "keep"}, 6, MANY)],
        "structure": [({"structure": "fives"}, 0), ({"structure": "tiles"}, 0)],
        "timing": [({"timing": "instead"}, 9)],
    },
    "deep_r": {
        "density": DENSITY,
        "until": [({"until": 7}, 7)],
        "l1": [({"l1": 0.1}, 1), ({"l1": 0.0}, 6)],
        "noise": [({"noise": 0.1}, 1), ({"noise": 0.0}, 3)],
        "grow": [({"grow": "gradient"}, 3), ({"grow": "momentum"}, 3)],
        "redistribute": [({"redistribute": "magnitude"}, 4)],
        "decay": [({"decay": 0.0}, 3, {"grow": "momentum"})],
        "allocate": [({"allocate": "erk"}, 0)],
    },
    "haste": {
        "density": [({"density": 0.3}, 0), ({"density": None, "allocate": EXPLICIT}, 0)],
        **TIMES,
        "until": [({"until": 40}, 15), ({"until": 4}, 6)],
        "fraction": [({"fraction": 0.7}, 3), ({"fraction": 0.0}, 3)],
        "anneal": [({"anneal": "cosine"}, 3), ({"anneal": "linear"}, 3)],
        "drop": [({"drop": "taylor"}, 3), ({"drop": "global"}, 3, {"structure": None})],
        "allocate": [({"allocate": "erk"}, 0)],
        "regrow_dropped": [({"regrow_dropped": "keep"}, 12, {"fraction": 0.7})],
        "timing": [({"timing": "instead"}, 3, {"fraction": 0.7})],
        "structure": [({"structure": s}, 0) for s in (None, "tiles", "rows")],
    },
    "gse": {
        "density": DENSITY,
        **TIMES,
        "until": [({"until": 40}, 3), ({"until": 4}, 3)],
        "fraction": FRACTION,
        "anneal": [({"anneal": "constant"}, 3), ({"anneal": "inverse_power"}, 3), ({"anneal": "linear"}, 3)],
        "gamma": [({"gamma": 2.0}, 3), ({"gamma": 0.5}, 3)],
        "drop": [({"drop": "per_sign"}, 3, {"regrow_dropped": "keep"}), ({"drop": "global"}, 3)],
        "redistribute": [({"redistribute": "magnitude"}, 3), ({"redistribute": "momentum"}, 3)],
        "decay": [({"decay": 0.0}, 3, {"redistribute": "momentum"})],
        "allocate": [({"allocate": "erk"}, 0)],
        "regrow_dropped": [({"regrow_dropped": "keep"}, 3), ({"regrow_dropped": "reset"}, 3, MANY)],
        "structure": [({"structure": "fives"}, 0), ({"structure": "tiles"}, 0)],
        "timing": [({"timing": "instead"}, 6)],
    },
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
    defaults = {
        k: p.default for k, p in inspect.signature(BY_NAME[name]).parameters.items() if p.default is not p.empty
    }
    assert defaults == {k: meant(k, v) for k, v in PAPERS[name].items()}


ALL = list(PAPERS)
TRADING = [name for name in ALL if name != "haste"]
"""Those that may redistribute."""
UPDATED = ["dsr", "mest", "gse"]

REFUSED: list[tuple[list[str], dict[str, Any], str]] = [
    (ALL, {"density": 0.0}, r"density must lie in \(0, 1\], got 0"),
    (ALL, {"density": float("nan")}, r"density must lie in \(0, 1\], got nan"),
    (UPDATED, {"fraction": 1.1}, r"the drop fraction must lie in \[0, 1\], got 1.1"),
    (UPDATED, {"regrow_dropped": "yes"}, "regrow_dropped must be one of keep, reset, forbid, got 'yes'"),
    (UPDATED, {"timing": "before"}, "timing must be one of instead, after, got 'before'"),
    (["dsr"], {"threshold": 0.0}, "threshold must lie above 0 .* got threshold 0, tolerance 0.1"),
    (["dsr"], {"threshold": math.inf}, "got threshold inf"),
    (["dsr"], {"threshold": math.nan}, "got threshold nan"),
    (["dsr"], {"tolerance": 1.0}, "got threshold 0.06, tolerance 1"),
    (["dsr"], {"tolerance": -0.1}, "got threshold 0.06, tolerance -0.1"),
    (["mest"], {"gradient_weight": -1.0}, "gradient_weight must be finite and at least 0, got -1"),
    (["mest"], {"gradient_weight": math.inf}, "gradient_weight must be finite and at least 0, got inf"),
    (
        TRADING,
        {"decay": 0.5, "redistribute": None},
        "decay is of a running mean .* leave out 0.5",
    ),
    (TRADING, {"decay": 1.0, "redistribute": mean_momentum}, r"decay must lie in \[0, 1\), got 1"),
    (
        ["mest"],
        {"soft": True, "redistribute": mean_momentum},
        "a soft memory bound .* redistribute would move",
    ),
    (["mest"], {"soft": True, "decay": 0.5}, "decay is of a running mean of gradients, which neither"),
    (["deep_r"], {"l1": -1.0}, "l1 and noise must be finite and at least 0, got l1 -1 and noise 0.01"),
    (["deep_r"], {"noise": math.inf}, "got l1 0.001 and noise inf"),
    (["haste"], {"regrow_dropped": "forbid"}, "every group of outputs gets back what it lost, .* may leave it no room"),
    (["gse"], {"gamma": 0.3}, "gamma 0.3 gives fewer candidates than the drop fraction 0.4 asks to grow"),
    (["gse"], {"gamma": math.nan}, "gamma nan gives fewer"),
    (["gse"], {"gamma": math.inf}, "gamma inf"),
]


@pytest.mark.parametrize(
    ("name", "change", "told"), [(name, change, told) for names, change, told in REFUSED for name in names]
)
def test_a_wrong_value_is_refused_by_name(name: str, change: dict[str, Any], told: str) -> None:
    """Property 48: also options that contradict each other, with both values."""
    with pytest.raises(ValueError, match=f"^{name}: .*{told}"):
        BY_NAME[name](**(SHORT[name] | change))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("change", [{"until": 1}, {"until": -1}], ids=str)
def test_times_at_which_nothing_happens_are_refused(name: str, change: dict[str, int]) -> None:
    """Property 48."""
    with pytest.raises(ValueError, match="until"):
        BY_NAME[name](**(SHORT[name] | change))


def trained(method: Method, storage: Any, steps: int, see: Callable[[int, dict[str, Tensor]], None]) -> None:
    """Train the small network and show, after each step, which entries are active and their values, dense."""
    model = network("mlp", 0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sparsifier = regrow.sparsify(model, optimizer, method, storage=storage)
    for step, (x, y) in enumerate([(None, None), *batches("mlp", 0, steps)]):
        if step:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        seen = {}
        for weight in sparsifier.weights:
            dense = torch.full((weight.topology.numel,), torch.nan, dtype=torch.float64)
            dense[weight.topology.indices] = weight.values()
            seen[weight.name] = dense
        see(step, seen)


def active(dense: Tensor) -> int:
    return int((~dense.isnan()).sum())


@pytest.mark.parametrize("storage", ["masked", "compressed"])
def test_the_soft_bound_is_exceeded_by_the_fraction_and_kept_at_the_end(storage: str) -> None:
    """floor(f n) more at an update, in each weight, until the next one; from `until` on exactly the target."""
    log: list[list[int]] = []
    method = methods.mest(0.3, until=11, interval=4, fraction=0.5, anneal=constant, soft=True)
    assert method.needs == Need.OVERSHOOT
    trained(method, storage, 14, lambda step, seen: log.append([active(d) for d in seen.values()]))
    targets = [29, 32, 11]
    more = [n + n // 2 for n in targets]
    assert log == [targets] * 4 + [more] * 7 + [targets] * 4


@pytest.mark.parametrize("storage", ["masked", "compressed"])
def test_what_a_nearly_full_weight_cannot_take_is_grown_elsewhere_and_told(
    storage: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Property 8: the memory bound of the network is used to the last entry where there is room."""
    log: list[list[int]] = []
    dense = explicit({"0": 0.25, "2": 0.5, "4": 1.0})
    method = methods.mest(None, allocate=dense, until=7, interval=3, fraction=0.5, soft=True)
    with caplog.at_level(logging.WARNING, "regrow"):
        trained(method, storage, 4, lambda step, seen: log.append([active(d) for d in seen.values()]))
    first, then = log[0], log[3]
    assert first == [24, 54, 36] and sum(then) - sum(first) == sum(floor(0.5 * (1 - 3 / 7) * n) for n in first)
    assert then[2] == 36
    assert "step 3: 4.weight has room for 0 of 10 entries beyond its density: 31 grow in all, of 31" in caplog.text


@pytest.mark.parametrize("storage", ["masked", "compressed"])
def test_no_weight_holds_more_than_twice_its_density(storage: str, caplog: pytest.LogCaptureFixture) -> None:
    """What no weight can take is not grown, and the log says how much."""
    log: list[list[int]] = []
    dense = explicit({"0": 0.25, "2": 0.5, "4": 1.0})
    method = methods.mest(None, allocate=dense, until=9, interval=3, fraction=1.0, anneal=constant, soft=True)
    with caplog.at_level(logging.WARNING, "regrow"):
        trained(method, storage, 10, lambda step, seen: log.append([active(d) for d in seen.values()]))
    assert log == [[24, 54, 36]] * 3 + [[48, 108, 36]] * 6 + [[24, 54, 36]] * 2
    assert "4.weight has room for 0 of 36 entries beyond its density: 78 grow in all, of 114" in caplog.text


def test_a_weight_without_a_gradient_ends_at_its_density_too() -> None:
    """The soft bound ends at `until` for a weight that the last backward did not reach, by magnitude."""
    model = nn.ModuleList([nn.Linear(6, 5), nn.Linear(6, 5)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = regrow.sparsify(model, optimizer, methods.mest(0.5, until=4, interval=2, fraction=0.8, soft=True))
    counts = []
    for step in range(1, 5):
        optimizer.zero_grad()
        for layer in model if step < 4 else model[:1]:
            layer(torch.randn(3, 6)).square().sum().backward()
        if step == 4:
            values = sparsifier.weights[1].values().abs().sort().values
        optimizer.step()
        counts.append([t.nnz for t in sparsifier.topologies.values()])
    assert counts == [[15, 15], [21, 21], [21, 21], [15, 15]]
    assert torch.equal(sparsifier.weights[1].values().abs().sort().values, values[6:])


@pytest.mark.parametrize("storage", ["masked", "compressed"])
def test_every_active_value_has_the_sign_of_its_position(storage: str) -> None:
    """DEEP R: from the start to `until`, at every step, with exact counts; zero is of either sign."""
    changed = []

    def see(step: int, seen: dict[str, Tensor]) -> None:
        for name, dense in seen.items():
            signs = torch.from_numpy(Stream(0, name, step).signs(np.arange(dense.numel())))
            here = ~dense.isnan()
            assert step > 14 or bool((dense[here] * signs[here] >= 0).all()), f"{name} after step {step}"
            assert active(dense) == {"0.weight": 29, "2.weight": 32, "4.weight": 11}[name]
        changed.append({n: ~d.isnan() for n, d in seen.items()})

    trained(methods.deep_r(0.3, until=15, l1=0.01, noise=0.02), storage, 17, see)
    moved = [step for step in range(1, 18) if any((changed[step][n] != changed[step - 1][n]).any() for n in changed[0])]
    assert len(moved) > 10 and max(moved) <= 14


def test_deep_r_starts_with_the_values_of_the_modules_and_fixed_signs() -> None:
    model, before = network("mlp", 0), network("mlp", 0)
    regrow.sparsify(model, torch.optim.SGD(model.parameters()), methods.deep_r(0.3, until=9), seed=4)
    for (name, p), q in zip(model.named_parameters(), before.parameters(), strict=True):
        if p.dim() > 1:
            here = p != 0
            assert torch.equal(p[here].abs(), q[here].abs())
            signs = Stream(4, name, 0).signs(np.arange(p.numel())).reshape(p.shape)
            assert torch.equal(p[here].sign(), torch.from_numpy(signs)[here].to(p))


def test_deep_r_refuses_a_model_without_values() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))
    with pytest.raises(ValueError, match=r"^0\.weight lies on the meta device .* build the model on a real"):
        regrow.sparsify(model, torch.optim.SGD(model.parameters()), methods.deep_r(0.3, until=9), storage="compressed")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_deep_r_refuses_values_that_are_not_finite(value: float) -> None:
    good, bad = Fake([1, 2, 0], [0, 1], [1, 1, 1], "good"), Fake([1, value, 3], [0, 1], [1, 1, 1], "bad")
    (rule,) = methods.deep_r(0.5, until=3).update
    before = good.dense.clone()
    with pytest.raises(ValueError, match="bad: 1 of 2 values are not finite"):
        rule.apply(Weights((good, bad)), 1)
    assert good.rewired == bad.rewired == 0
    assert torch.equal(good.dense, before)


def test_an_entry_at_zero_stays() -> None:
    """Algorithm 1 makes dormant what is below zero, so that newcomers, which begin at zero, have a chance."""
    weight = Fake([0] * 12, [0, 3, 4, 7, 9])
    (rule,) = methods.deep_r(0.5, until=3, l1=0.0, noise=0.0).update
    rule.apply(Weights((weight,)), 1)
    assert weight.active() == {0, 3, 4, 7, 9}


class Spied(Fake):
    """A weight that counts at how many positions its gradient was read."""

    read = 0

    def grads_at(self, positions: Tensor) -> Tensor:
        assert self.grad is not None and bool((positions.diff() > 0).all())
        self.read += positions.numel()
        return self.grad[positions]


@pytest.mark.parametrize(
    ("gamma", "count", "read"), [(1.0, 3, 6), (2.5, 3, 15), (2.5, 20, 20), (0.0, 3, 3), (9.0, 3, 24), (1.0, 24, 24)]
)
def test_the_gradient_is_read_at_the_candidates_alone(gamma: float, count: int, read: int) -> None:
    """floor(gamma nnz) candidates, at least as many as grow and at most as many as there are."""
    weight = Spied(range(30), range(0, 30, 5), [(7 * i) % 30 for i in range(30)])
    chosen = sampled_gradient(gamma)(weight, weight.topology, count)
    assert chosen.numel() == count and weight.read == read
    assert not set(chosen.tolist()) & set(range(0, 30, 5))


def test_candidates_are_uniform() -> None:
    """Property 25, for the subset: all that are drawn grow, each of 40 free positions as often (chi-square)."""
    seen, rounds = np.zeros(50), 2000
    for seed in range(rounds):
        weight = Spied([1] * 50, range(0, 50, 5), range(50))
        weight.generator = Stream(seed, "w", 1)
        seen[sampled_gradient(0.8)(weight, weight.topology, 8).numpy()] += 1
    assert not seen[::5].any()
    want = rounds * 8 / 40
    drawn = seen[np.arange(50) % 5 > 0]
    assert ((drawn - want) ** 2 / (want * (1 - 8 / 40))).sum() < 39 + 4 * (2 * 39) ** 0.5


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_names_its_weight(value: float) -> None:
    """Property 5."""
    weight = Spied([1] + [0] * 4, [0], [0.0, value, 0, 0, 0], "layer.weight")
    with pytest.raises(ValueError, match=r"layer\.weight: 1 of 4 growth scores are not finite"):
        sampled_gradient(9.0)(weight, Topology((1, 5), torch.tensor([0])), 1)


def test_a_subset_smaller_than_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="sampled_gradient: gamma must be finite and at least 0, got -1"):
        sampled_gradient(-1.0)


class Largest(TorchDispatchMode):
    """The number of entries of the largest tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, Tensor) and not tensor.is_meta:
                self.numel = max(self.numel, tensor.numel())
        return made


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_nothing_as_large_as_the_matrix_appears(optimizer: Any) -> None:
    """GSE compressed: 400 million entries of which 40,000 are active; steps, updates and all of them."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(20_000, 20_000, bias=False))
    opt = optimizer(model.parameters(), lr=0.01)
    tracemalloc.start()
    try:
        with Largest() as largest:
            method = methods.gse(1e-4, until=4, interval=1, fraction=0.3)
            sparsifier = regrow.sparsify(model, opt, method, storage="compressed")
            first = sparsifier.topologies["0.weight"]
            for _ in range(3):
                opt.zero_grad()
                model(torch.randn(2, 20_000)).square().mean().backward()
                opt.step()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert sparsifier.updates == 3
    last = sparsifier.topologies["0.weight"]
    assert last.nnz == first.nnz == 40_000
    assert 10_000 < last.without(first).numel() < 36_000
    assert largest.numel <= 200_000
    assert peak < 30e6
