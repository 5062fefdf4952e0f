"""Gradual pruning, GraNet and AC/DC against plain NumPy runs, and what their densities must do."""

from __future__ import annotations

import inspect
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import regrow
from regrow import methods
from regrow.core.method import Method, Need
from regrow.methods import BY_NAME
from regrow.metrics import flops
from regrow.parts import at_least, by_flops, globally, mean_momentum, survivors
from regrow.parts.schedules import constant
from support.cases import Changes, cases, require_predicted_difference
from support.dynamics import DROPS, Watch, drop_and_grow
from support.paper import (
    Arrays,
    History,
    Program,
    actual,
    assert_same,
    backward,
    batches,
    history,
    keep_largest,
    library,
    masks,
    meant,
    network,
    progress,
    regular,
    sgd,
    shared,
    start,
    total_of,
    with_last,
)

PAPERS: dict[str, dict[str, Any]] = {
    "granet": {
        "prune_until": None,
        "init_density": 0.5,
        "begin": 0,
        "interval": 1000,
        "fraction": 0.5,
        "anneal": "cosine_to_0.005",
        "drop": "lowest",
        "grow": "gradient",
        "redistribute": None,
        "decay": None,
        "init_allocate": "erk",
        "allocate": "globally",
        "last_density": None,
        "last_layer": None,
        "regrow_dropped": "keep",
        "timing": "after",
        "structure": None,
    },
    "ac_dc": {"begin": None, "phase": None, "allocate": "globally", "timing": "after", "structure": None},
}
PAPERS["granet_uniform"] = PAPERS["granet"] | {"allocate": "uniform", "last_density": 0.2}
PAPERS["gmp"] = PAPERS["granet"] | {"init_density": 1.0, "fraction": None, "allocate": "uniform"}
PAPERS["gmp_uniform"] = PAPERS["gmp"] | {"last_density": 0.2}

SHORT: dict[str, dict[str, Any]] = {
    "granet": {"density": 0.3, "until": 15, "interval": 3},
    "granet_uniform": {"density": 0.3, "until": 15, "interval": 3, "last_density": 0.45},
    "gmp": {"density": 0.3, "until": 13, "interval": 3},
    "gmp_uniform": {"density": 0.3, "until": 13, "interval": 3, "last_density": 0.45},
    "ac_dc": {"density": 0.3, "until": 13, "phase": 2},
}


def paper(name: str, options: dict[str, Any], kind: str, seed: int) -> History:
    given = PAPERS[name] | options
    return ac_dc_run(given, kind, seed) if name == "ac_dc" else granet_run(given, kind, seed)


def granet_run(o: dict[str, Any], kind: str, seed: int) -> History:
    """Prune along the ramp, then exchange, at every interval; the ramp's end is met by pruning alone.

    Gradual magnitude pruning is the ramp alone, to `until`: a fraction of None.
    """
    end = o["prune_until"] or (o["until"] if o["fraction"] is None else o["until"] // 2)
    watch = Watch(o["decay"])

    def update(run: Program, g: Arrays) -> None:
        if run.step <= end:
            left = 1 - progress(o | {"until": end}, run.step)
            density = o["density"] + (o["init_density"] - o["density"]) * left**3
            total = min(total_of(run, density), run.nnz())
            keep_largest(run, with_last(run, o["allocate"], total, o["last_layer"], o["last_density"]))
        if regular(o, run.step) and o["fraction"] is not None:
            drop_and_grow(o, watch)(run, g)

    def counts(run: Program) -> list[int]:
        return with_last(run, o["init_allocate"], total_of(run, o["init_density"]), o["last_layer"], o["last_density"])

    run = start(kind, seed, None if o["init_density"] == 1 else counts, o["regrow_dropped"], o["structure"])
    return history(run, kind, lambda step: regular(o, step) or step == end, update, o["timing"], watch)


def ac_dc_run(o: dict[str, Any], kind: str, seed: int) -> History:
    """Walk through the phases: sparse ones, each followed by a whole dense one, and sparse for good."""
    phase = o["phase"] or max(1, o["until"] // 17)
    begin = o["begin"] or 2 * phase
    switches, at = {o["until"]: "sparse"}, begin
    while at + phase < o["until"]:
        switches |= {at: "sparse", at + phase: "dense"}
        at += 2 * phase

    def update(run: Program, g: Arrays) -> None:
        if switches[run.step] == "sparse":
            keep_largest(run, shared(run, o["allocate"], total_of(run, o["density"]), run.sparse))
        else:
            run.mask = {n: np.ones_like(m) for n, m in run.mask.items()}

    run = start(kind, seed, structure=o["structure"])
    return history(run, kind, switches.__contains__, update, o["timing"])


RUNS: list[tuple[str, dict[str, Any]]] = [
    ("granet", {}),
    ("granet", {"init_density": 1.0}),
    ("granet", {"timing": "instead", "regrow_dropped": "reset"}),
    ("granet", {"init_density": 0.9, "density": 0.7, "fraction": 0.9, "regrow_dropped": "forbid", "prune_until": 15}),
    ("granet", {"allocate": "erk", "init_allocate": "uniform", "begin": 2, "interval": 4, "anneal": "linear"}),
    ("granet", {"last_density": 0.6, "last_layer": "0"}),
    ("granet", {"interval": 1, "prune_until": 2, "density": 0.05}),
    *(("granet", {"drop": d, "grow": "momentum", "redistribute": "magnitude"}) for d in DROPS),
    ("granet", {"grow": "mixed", "redistribute": "momentum", "decay": 0.5, "init_density": 1.0, "timing": "instead"}),
    ("granet_uniform", {"grow": "random", "drop": "taylor"}),
    ("granet_uniform", {}),
    ("granet_uniform", {"init_density": 1.0, "prune_until": 15}),
    ("granet_uniform", {"last_density": None}),
    ("granet_uniform", {"last_density": 0.9, "init_density": 0.4, "timing": "instead"}),
    *(("gmp", {"allocate": a}) for a in ("uniform", "erk", "globally", "layer_adaptive")),
    ("gmp", {"allocate": "globally", "timing": "instead"}),
    ("gmp", {"interval": 5, "begin": 2}),
    ("gmp", {"last_density": 0.6, "last_layer": "0", "allocate": "erk"}),
    ("granet", {"allocate": "layer_adaptive"}),
    ("granet_uniform", {"allocate": "layer_adaptive", "init_density": 1.0, "interval": 2}),
    ("gmp_uniform", {}),
    ("gmp_uniform", {"begin": 2, "interval": 5, "timing": "instead"}),
    ("gmp_uniform", {"last_density": None}),
    ("ac_dc", {}),
    ("ac_dc", {"begin": 1, "phase": 3, "allocate": "uniform", "until": 15}),
    *((name, {"structure": "fives"}) for name in ("granet", "granet_uniform", "gmp", "gmp_uniform", "ac_dc")),
    ("gmp", {"structure": "rows", "allocate": "globally", "density": 0.5}),
    ("granet", {"structure": "tiles", "init_density": 1.0, "allocate": "layer_adaptive", "density": 0.4}),
    ("ac_dc", {"begin": 3, "phase": 1, "timing": "instead", "density": 0.1}),
]


@pytest.mark.parametrize("kind", ["mlp", "conv"])
@pytest.mark.parametrize(("name", "options"), RUNS, ids=str)
def test_a_run_is_that_of_the_paper(name: str, options: dict[str, Any], kind: str) -> None:
    """Properties 22 and 32: topologies, values and momentum over a whole run; the ramp first, then the exchange."""
    options = SHORT[name] | options
    for seed in range(3):
        assert_same(actual(library(name, options), kind, seed), paper(name, options, kind, seed))


TIMES: dict[str, Changes] = {
    "structure": [({"structure": "fives"}, 3), ({"structure": "tiles"}, 3)],
    "interval": [({"interval": 4}, 3), ({"interval": 2}, 2)],
    "begin": [({"begin": 1}, 1), ({"begin": 5}, 3)],
    "timing": [({"timing": "instead"}, 3)],
    "density": [({"density": 0.2}, 3)],
}
GRANET: dict[str, Changes] = TIMES | {
    "structure": [({"structure": "fives"}, 0), ({"structure": "tiles"}, 0)],
    "until": [({"until": 13}, 3), ({"until": 12}, 12, {"prune_until": 7, "anneal": "constant"})],
    "prune_until": [({"prune_until": 15}, 3), ({"prune_until": 6}, 3)],
    "init_density": [({"init_density": 0.6}, 0), ({"init_density": 1.0}, 0)],
    "fraction": [({"fraction": 0.7}, 3), ({"fraction": 0.0}, 3)],
    "anneal": [
        *(({"anneal": a}, 3) for a in ("constant", "linear", "inverse_power")),
        ({"anneal": "cosine"}, 12, {"fraction": 0.55}),
    ],
    "init_allocate": [({"init_allocate": "uniform"}, 0)],
    "drop": [({"drop": "per_sign"}, 3), ({"drop": "taylor"}, 3), ({"drop": "global"}, 3)],
    "grow": [({"grow": "random"}, 3), ({"grow": "momentum"}, 3)],
    "decay": [({"decay": 0.0}, 3, {"grow": "momentum"}), ({"decay": 0.5}, 3, {"grow": "momentum"})],
    "last_layer": [({"last_layer": "0.weight", "last_density": 0.7}, 0)],
    "regrow_dropped": [({"regrow_dropped": "forbid"}, 3), ({"regrow_dropped": "reset"}, 6)],
}
FREE = {"last_density": None}
CASES: dict[str, dict[str, Changes]] = {
    "granet": GRANET
    | {
        "allocate": [({"allocate": a}, 3) for a in ("uniform", "erk", "layer_adaptive")],
        "redistribute": [({"redistribute": "magnitude"}, 3), ({"redistribute": "momentum"}, 3)],
        "last_density": [({"last_density": 0.9}, 0), ({"last_density": 0.65}, 3)],
    },
    "granet_uniform": GRANET
    | {
        "allocate": [({"allocate": "globally"}, 3), ({"allocate": "erk"}, 3)],
        "redistribute": [({"redistribute": "magnitude"}, 3, FREE), ({"redistribute": "momentum"}, 3, FREE)],
        "last_density": [({"last_density": 0.9}, 0), ({"last_density": None}, 3)],
    },
    "gmp": TIMES
    | {
        "density": [({"density": 0.2}, 3), ({"density": 0.5}, 3)],
        "interval": [({"interval": 4}, 3), ({"interval": 6}, 3), ({"interval": 2}, 2)],
        "begin": [({"begin": 1}, 3), ({"begin": 5}, 3)],
        "until": [({"until": 7}, 3), ({"until": 40}, 3)],
        "allocate": [({"allocate": a}, 3) for a in ("erk", "globally", "layer_adaptive")],
        "last_density": [({"last_density": 0.45}, 6), ({"last_density": 0.9}, 3)],
        "last_layer": [({"last_layer": "0"}, 6, {"last_density": 0.6})],
    },
    "gmp_uniform": TIMES
    | {
        "begin": [({"begin": 1}, 3), ({"begin": 5}, 3)],
        "until": [({"until": 7}, 3), ({"until": 14}, 3)],
        "allocate": [({"allocate": "erk"}, 3), ({"allocate": "globally"}, 3)],
        "last_density": [({"last_density": None}, 6), ({"last_density": 0.9}, 3)],
        "last_layer": [({"last_layer": "2"}, 6)],
    },
    "ac_dc": {
        "density": [({"density": 0.2}, 4)],
        "until": [({"until": 11}, 11), ({"until": 15}, 12)],
        "begin": [({"begin": 3}, 3), ({"begin": 5}, 4)],
        "phase": [({"phase": 3}, 4), ({"phase": None}, 2)],
        "structure": [({"structure": "fives"}, 4), ({"structure": "tiles"}, 4)],
        "allocate": [({"allocate": "uniform"}, 4), ({"allocate": "erk"}, 4)],
        "timing": [({"timing": "instead"}, 4)],
    },
}


@pytest.mark.parametrize(("name", "change", "first", "both"), cases(CASES))
def test_an_option_makes_the_difference_that_is_predicted(
    name: str, change: dict[str, Any], first: int, both: dict[str, Any]
) -> None:
    """Property 48."""
    require_predicted_difference(name, paper, SHORT[name], change, first, both)


@pytest.mark.parametrize("name", ["granet", "granet_uniform", "gmp", "gmp_uniform", "ac_dc"])
def test_what_is_not_given_is_the_papers(name: str) -> None:
    """Property 48: a default is an option value too."""
    given = inspect.signature(BY_NAME[name]).parameters
    for option in set(given) & set(PAPERS[name]):
        assert given[option].default == meant(option, PAPERS[name][option]), option
    options = {k: v for k, v in SHORT[name].items() if k != "last_density"}
    assert_same(actual(library(name, options)), paper(name, options, "mlp", 0))


@pytest.mark.parametrize("name", ["granet", "granet_uniform"])
@pytest.mark.parametrize("init_density", [0.5, 1.0])
@pytest.mark.parametrize(("interval", "prune_until"), [(3, 8), (4, 8), (5, 9)])
def test_the_density_follows_the_ramp_and_then_stays(
    name: str, init_density: float, interval: int, prune_until: int
) -> None:
    """Properties 22 and 32: exact counts from values, the end met whatever the interval, no count changes after it."""
    model = network("mlp", 0)
    numel = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    optimizer = sgd(model)
    method = BY_NAME[name](
        0.1, until=16, prune_until=prune_until, interval=interval, init_density=init_density, last_density=None
    )
    sparsifier = regrow.sparsify(model, optimizer, method)
    wanted = math.floor(init_density * numel + 0.5)
    for step, batch in enumerate(batches("mlp", 0), start=1):
        backward(model, batch)
        optimizer.step()
        if step == prune_until or (step < prune_until and step % interval == 0):
            density = 0.1 + (init_density - 0.1) * (1 - step / prune_until) ** 3
            wanted = math.floor(density * numel + 0.5)
        active = {n: int(m.sum()) for n, m in masks(sparsifier).items()}
        assert sum(active.values()) == wanted
        assert sum(int((p != 0).sum()) for p in model.parameters() if p.dim() > 1) <= wanted
        if step == prune_until:
            at_the_end = active
    assert wanted == math.floor(0.1 * numel + 0.5)
    assert active == at_the_end


def test_regeneration_goes_on_after_the_ramp() -> None:
    """Property 32: entries still move, and the drop fraction does not reach zero before `until`."""
    sparsifier, moved = track("mlp", methods.granet(0.3, until=16, prune_until=4, interval=2, anneal=constant))
    assert moved == [2, 4, 6, 8, 10, 12, 14]
    assert sparsifier.updates == 7


def track(kind: str, method: Method) -> tuple[regrow.Sparsifier, list[int]]:
    """A whole run, and the steps at which topologies changed."""
    model = network(kind, 0)
    optimizer = sgd(model)
    sparsifier = regrow.sparsify(model, optimizer, method)
    moved = []
    for step, batch in enumerate(batches(kind, 0), start=1):
        before = masks(sparsifier)
        backward(model, batch)
        optimizer.step()
        if any((before[n] != m).any() for n, m in masks(sparsifier).items()):
            moved.append(step)
    return sparsifier, moved


def test_no_update_falls_on_the_last_step_of_a_run() -> None:
    """Property 21: with `until` at the end of the run, nothing grows that is never trained."""
    _, moved = track("mlp", methods.granet(0.3, until=16, interval=4, anneal=constant))
    assert moved == [4, 8, 12]


def test_at_the_forced_end_of_the_ramp_nothing_grows() -> None:
    model = network("mlp", 0)
    optimizer = sgd(model)
    sparsifier = regrow.sparsify(model, optimizer, methods.granet(0.2, until=16, prune_until=5, interval=3))
    for batch in batches("mlp", 0)[:5]:
        before = masks(sparsifier)
        backward(model, batch)
        optimizer.step()
    after = masks(sparsifier)
    assert all(not (after[n] & ~before[n]).any() for n in after)
    assert sum(int(m.sum()) for m in after.values()) < sum(int(m.sum()) for m in before.values())


def test_a_layer_may_empty_under_global_pruning_and_at_least_prevents_it() -> None:
    """Property 23."""
    counts = {}
    for label, allocate in (("free", globally), ("guarded", at_least(3, globally))):
        model = network("mlp", 0)
        with torch.no_grad():
            model[2].weight *= 1e-3
        optimizer = sgd(model)
        method = methods.granet(0.1, until=16, prune_until=4, interval=2, fraction=0.0, allocate=allocate)
        sparsifier = regrow.sparsify(model, optimizer, method)
        for batch in batches("mlp", 0)[:4]:
            backward(model, batch)
            optimizer.step()
        counts[label] = {n: int(m.sum()) for n, m in masks(sparsifier).items()}
    assert counts["free"]["2.weight"] < 3 <= counts["guarded"]["2.weight"]
    assert sum(counts["free"].values()) == sum(counts["guarded"].values()) == math.floor(0.1 * 240 + 0.5)


@pytest.mark.parametrize("scale", [0.1, 10.0])
def test_a_budget_in_flops_is_met_at_every_pruning(scale: float) -> None:
    """Whether the entries that stay are cheap ones or dear ones, so more or fewer of them than the density says."""
    model = network("conv", 0)
    with torch.no_grad():
        model[0].weight *= scale
    rows = flops(model, torch.zeros(1, 2, 5, 5).double()).layers
    uses = {row.name: row.times[0] for row in rows}
    assert uses == {"0.weight": 9, "2.weight": 4, "5.weight": 1}
    dense = sum(math.prod(row.shape) * uses[row.name] for row in rows)
    optimizer = sgd(model)
    method = methods.gmp(0.2, until=13, interval=3, allocate=by_flops(uses, globally))
    sparsifier = regrow.sparsify(model, optimizer, method)
    for step, batch in enumerate(batches("conv", 0), start=1):
        backward(model, batch)
        optimizer.step()
        cost = sum(uses[n] * int(m.sum()) for n, m in masks(sparsifier).items())
        if method.due(step):
            share = 0.2 + 0.8 * (1 - step / 13) ** 3
            entries = sum(math.prod(row.shape) for row in rows)
            budget = math.floor(share * entries + 0.5) / entries * dense
            assert budget - 9 < cost <= budget
    assert (sparsifier.density < 0.2) == (scale > 1)


@pytest.mark.parametrize("name", ["granet_uniform", "gmp_uniform"])
@pytest.mark.parametrize("density", [0.05, 0.1, 0.2, 0.3])
def test_the_last_layer_keeps_a_fifth(name: str, density: float) -> None:
    """Gale's rule by its formula, for a layer of any name: the others share what remains at one density."""
    model = nn.Sequential(nn.Linear(50, 80), nn.Tanh(), nn.Linear(80, 60), nn.Tanh(), nn.Linear(60, 10))
    optimizer = sgd(model)
    dense = {} if name == "gmp_uniform" else {"init_density": 1.0, "fraction": 0.0}
    sparsifier = regrow.sparsify(model, optimizer, BY_NAME[name](density, until=4, interval=1, **dense))
    for _ in range(4):
        backward(model, (torch.randn(6, 50), torch.randint(0, 4, (6,))))
        optimizer.step()
    everything, last = 50 * 80 + 80 * 60 + 600, 600
    others = (density * everything - 0.2 * last) / (everything - last) if density < 0.2 else density
    found = {n: m.mean() for n, m in masks(sparsifier).items()}
    assert found["4.weight"] == pytest.approx(max(0.2, density), abs=1e-9)
    assert found["0.weight"] == pytest.approx(others, abs=1 / 4000)
    assert found["2.weight"] == pytest.approx(others, abs=1 / 4800)


def test_dense_phases_are_dense_and_what_comes_back_starts_at_zero() -> None:
    """Property 10: the network's output is unchanged when every entry becomes active again."""
    model = network("mlp", 0)
    optimizer = sgd(model)
    sparsifier = regrow.sparsify(model, optimizer, methods.ac_dc(0.1, until=16, phase=2, timing="instead"))
    x, densities = batches("mlp", 0)[0][0], []
    for step, batch in enumerate(batches("mlp", 0), start=1):
        before = model(x).detach().clone()
        backward(model, batch)
        optimizer.step()
        densities.append(np.mean(np.concatenate(list(masks(sparsifier).values()))))
        if step in (6, 10, 14):
            assert torch.equal(model(x), before)
            zeros = ~torch.cat([p.detach().bool().view(-1) for p in model.parameters() if p.dim() > 1])
            assert zeros.double().mean() == pytest.approx(0.9)
    assert densities == pytest.approx(
        [1.0] * 3 + [0.1] * 2 + [1] * 2 + [0.1] * 2 + [1] * 2 + [0.1] * 2 + [1] * 2 + [0.1]
    )


@pytest.mark.parametrize(
    ("options", "sparse", "dense"),
    [
        ({"until": 85, "begin": 10, "phase": 5}, [*range(10, 71, 10), 85], range(15, 76, 10)),
        ({"until": 85}, [*range(10, 71, 10), 85], range(15, 76, 10)),
        ({"until": 34}, [*range(4, 29, 4), 34], range(6, 31, 4)),
        ({"until": 33}, [*range(2, 31, 2), 33], range(3, 32, 2)),
        ({"until": 170, "begin": 10, "phase": 20}, [10, 50, 90, 130, 170], range(30, 151, 40)),
        ({"until": 4, "begin": 1, "phase": 2}, [1, 4], [3]),
    ],
)
def test_phases_fall_on_the_published_epochs(options: dict[str, int], sparse: list[int], dense: Any) -> None:
    """ImageNet's 100 epochs and CIFAR-100's 200, with one step per epoch; and the shortest run there is."""
    pruning, activation = methods.ac_dc(0.1, **options).update
    assert [t for t in range(200) if pruning.due(t)] == list(sparse)
    assert [t for t in range(200) if activation.due(t)] == list(dense)


@pytest.mark.parametrize("name", ["granet", "granet_uniform"])
def test_the_exchange_ends_at_half_a_percent_unless_told_otherwise(name: str) -> None:
    """Property 20: the default anneal, whose end the small counts of other tests do not show."""
    default = inspect.signature(BY_NAME[name]).parameters["anneal"].default
    assert [default(0.5, 400, 0)(step) for step in (0, 400)] == [0.5, 0.005]
    assert default(0.5, 400, 0)(200) == pytest.approx(0.2525)


def test_needs_follow_from_where_the_run_starts() -> None:
    assert methods.granet(0.1, until=5000).needs == Need.GRADIENT
    assert methods.granet(0.1, until=5000, init_density=1.0).needs == Need.GRADIENT | Need.DENSE_VALUES
    for name in ("gmp", "gmp_uniform", "ac_dc"):
        assert BY_NAME[name](0.1, until=5000).needs == Need.DENSE_VALUES


RAMPS = ["granet", "granet_uniform"]
WITH_LAST = [*RAMPS, "gmp", "gmp_uniform"]
ALL = [*WITH_LAST, "ac_dc"]
REFUSED: list[tuple[list[str], dict[str, Any], str]] = [
    (ALL, {"density": 0.0}, r"density must lie in \(0, 1\], got 0"),
    (ALL, {"density": None}, "give a density"),
    (ALL, {"density": 1.5}, r"density must lie in \(0, 1\], got 1.5"),
    (ALL, {"density": float("nan")}, r"density must lie in \(0, 1\], got nan"),
    (ALL, {"timing": "before"}, "timing must be one of instead, after, got 'before'"),
    (RAMPS, {"init_density": 0.2}, r"init_density must lie between density \(0.3\) and 1, got 0.2"),
    (RAMPS, {"init_density": 0.0}, r"init_density must lie between density \(0.3\) and 1, got 0"),
    (RAMPS, {"init_density": 1.01}, r"init_density must lie between density \(0.3\) and 1, got 1.01"),
    (RAMPS, {"prune_until": 16}, r"prune_until \(16\) must not lie after until \(15\)"),
    (RAMPS, {"prune_until": 3}, "the ramp must end after the first update, at step 3, and prune_until is 3:"),
    (RAMPS, {"until": 6}, "the ramp .* first update, at step 3, and prune_until is 3, half of until where it is not"),
    (RAMPS, {"begin": 9}, "the ramp must end after the first update, at step 9, and prune_until is 7"),
    (RAMPS, {"fraction": 1.1}, r"the drop fraction must lie in \[0, 1\], got 1.1"),
    (RAMPS, {"regrow_dropped": "yes"}, "regrow_dropped must be one of keep, reset, forbid, got 'yes'"),
    (WITH_LAST, {"last_density": 1.2}, r"last_density must lie in \[0, 1\], got 1.2"),
    (WITH_LAST, {"last_density": None, "last_layer": "fc"}, r"last_layer \('fc'\) says where last_density holds"),
    (
        ["granet_uniform"],
        {"redistribute": mean_momentum},
        r"last_density \(0.45\) holds the last layer",
    ),
    (["granet"], {"redistribute": survivors, "last_density": 0.3}, r"last_density \(0.3\) holds the last layer"),
    (["granet"], {"decay": 0.5}, "decay is of a running mean of gradients, which neither .* leave out 0.5"),
    (["gmp", "gmp_uniform"], {"density": None}, "give a density, which the allocation only shares out"),
    (["gmp"], {"last_layer": "2"}, r"last_layer \('2'\) says where last_density holds"),
    (["ac_dc"], {"begin": 11}, r".*begin \(11\) .* phase \(2\) .* until \(13\)"),
    (["ac_dc"], {"begin": 0}, r".*begin \(0\) .* phase \(2\) .* until \(13\)"),
    (["ac_dc"], {"phase": 0}, r".*begin \(0\) .* phase \(0\) .* until \(13\)"),
    (["ac_dc"], {"until": 6}, r".*begin \(4\) .* phase \(2\) .* until \(6\)"),
]


@pytest.mark.parametrize(
    ("name", "change", "told"), [(name, change, told) for names, change, told in REFUSED for name in names]
)
def test_a_wrong_value_is_refused_by_name(name: str, change: dict[str, Any], told: str) -> None:
    """Property 48: contradictions name both values, before anything is made sparse."""
    with pytest.raises(ValueError, match=f"^{name}: {told}"):
        BY_NAME[name](**(SHORT[name] | change))


@pytest.mark.parametrize("name", WITH_LAST)
@pytest.mark.parametrize(
    "change", [{"interval": 0}, {"begin": -2}, {"begin": 15}, {"until": -1}, {"until": 3}], ids=str
)
def test_times_at_which_nothing_happens_are_refused(name: str, change: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"begin|until|interval"):
        BY_NAME[name](**(SHORT[name] | change))


@pytest.mark.parametrize("name", WITH_LAST)
@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            {"last_density": 0.3, "last_layer": "head"},
            "'head' matches none of the weights 0.weight, 2.weight, 4.weight",
        ),
        ({"last_density": 0.7, "density": 0.1}, "density 0.7 of 4.weight makes 25 entries of 24 in all"),
        ({"last_density": 0.66, "density": 0.1}, "24 entries of 24 in all, which leaves none for the others"),
    ],
)
def test_an_infeasible_last_layer_is_refused_at_once(name: str, options: dict[str, Any], told: str) -> None:
    """Before the model is touched, with the numbers."""
    model = network("mlp", 0)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=told):
        regrow.sparsify(model, sgd(model), BY_NAME[name](**(SHORT[name] | options)))
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def test_the_last_layer_of_a_packed_weight_is_all_its_blocks() -> None:
    model = nn.GRU(6, 8)
    method = methods.gmp_uniform(0.3, until=6, interval=2, last_density=0.5)
    sparsifier = regrow.sparsify(model, torch.optim.SGD(model.parameters(), lr=0.1), method)
    for _ in range(6):
        model.zero_grad()
        model(torch.randn(3, 2, 6))[0].sum().backward()
        next(iter(sparsifier.optimizers)).step()
    found = {n: t.nnz for n, t in sparsifier.topologies.items()}
    assert [found[f"weight_hh_l0[{i}]"] for i in range(3)] == [32] * 3
    assert sum(found.values()) == math.floor(0.3 * 3 * (48 + 64) + 0.5)


def test_global_pruning_at_a_sparse_start_is_refused_for_the_start() -> None:
    with pytest.raises(ValueError, match="a random start has none: allocate by uniform, er or erk"):
        model = network("mlp", 0)
        regrow.sparsify(model, sgd(model), methods.granet(0.1, until=16, interval=2, init_allocate=globally))
