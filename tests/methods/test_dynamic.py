"""RigL, SET, SNFS and DST against plain NumPy runs written from their papers, and single updates in detail."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import regrow
from regrow.core.method import Method, Need, Regrow, Start
from regrow.core.topology import Topology
from regrow.methods import RECIPES
from regrow.parts import growth, schedules
from regrow.parts.drops import lowest
from regrow.parts.redistribution import mean_momentum
from regrow.parts.scores import magnitude
from regrow.parts.updates import drop_and_grow, every
from support.cases import EXPLICIT, Changes, cases, require_predicted_difference
from support.paper import (
    LR,
    WEIGHT_DECAY,
    Array,
    Arrays,
    History,
    Pick,
    Program,
    actual,
    annealed,
    assert_same,
    at_random,
    backward,
    batches,
    counts_of,
    free,
    history,
    library,
    losses,
    masks,
    network,
    only,
    place,
    regular,
    sgd,
    share_out,
    start,
    top,
    without_smallest,
)

COMMON: dict[str, Any] = {
    "begin": None,
    "interval": 100,
    "fraction": 0.3,
    "anneal": "cosine",
    "decay": 0.9,
    "drop": "lowest",
    "redistribute": None,
    "allocate": "erk",
    "regrow_dropped": "keep",
    "timing": "after",
}
PAPERS: dict[str, dict[str, Any]] = {
    "set": COMMON | {"anneal": "constant", "grow": "random", "allocate": "er"},
    "snfs": COMMON | {"fraction": 0.5, "grow": "momentum", "redistribute": "momentum", "allocate": "uniform"},
    "rigl": COMMON | {"grow": "gradient", "timing": "instead"},
    "dst": COMMON | {"grow": "gradient"},
}
SMALL: dict[str, Any] = {"density": 0.3, "until": 13, "interval": 3}
SHORT: dict[str, dict[str, Any]] = dict.fromkeys(PAPERS, SMALL)

MANY = {"density": 0.7, "fraction": 0.9}

DENSITY: Changes = [({"density": 0.5}, 0), ({"density": None, "allocate": EXPLICIT}, 0)]
TIMES: dict[str, Changes] = {
    "interval": [({"interval": 4}, 3), ({"interval": 6}, 3)],
    "begin": [({"begin": 1}, 1), ({"begin": 5}, 3), ({"begin": 6}, 3)],
}
SHARED: dict[str, Changes] = {
    "density": DENSITY,
    **TIMES,
    "fraction": [({"fraction": 0.7}, 3), ({"fraction": 0.0}, 3), ({"fraction": 1.0}, 3)],
}

CASES: dict[str, dict[str, Changes]] = {
    "set": SHARED
    | {
        "begin": [({"begin": 5}, 3), ({"begin": 6}, 3, {"anneal": "cosine"})],
        "until": [({"until": 12}, 12), ({"until": 7}, 9)],
        "anneal": [({"anneal": "cosine"}, 3), ({"anneal": "linear"}, 3), ({"anneal": "inverse_power"}, 3)],
        "drop": [({"drop": "per_sign"}, 3)],
        "allocate": [({"allocate": "uniform"}, 0)],
        "regrow_dropped": [({"regrow_dropped": "forbid"}, 3), ({"regrow_dropped": "reset"}, 6, MANY)],
        "timing": [({"timing": "instead"}, 3)],
    },
    "snfs": SHARED
    | {
        "until": [({"until": 40}, 3), ({"until": 7}, 3)],
        "anneal": [({"anneal": "constant"}, 3), ({"anneal": "linear"}, 3)],
        "decay": [({"decay": 0.0}, 3), ({"decay": 0.5}, 3)],
        "redistribute": [({"redistribute": r}, 3) for r in (None, "magnitude", "nonzeros")],
        "allocate": [({"allocate": "erk"}, 0)],
        "regrow_dropped": [({"regrow_dropped": "forbid"}, 3), ({"regrow_dropped": "reset"}, 6)],
        "timing": [({"timing": "instead"}, 3)],
    },
    "rigl": SHARED
    | {
        "until": [({"until": 40}, 6), ({"until": 5}, 3)],
        "anneal": [({"anneal": "constant"}, 3), ({"anneal": "inverse_power"}, 3)],
        "allocate": [({"allocate": "er"}, 0), ({"allocate": "uniform"}, 0)],
        "regrow_dropped": [({"regrow_dropped": "forbid"}, 3), ({"regrow_dropped": "reset"}, 6)],
        "timing": [({"timing": "after"}, 3)],
    },
    "dst": SHARED
    | {
        "until": [({"until": 40}, 3), ({"until": 5}, 3)],
        "anneal": [({"anneal": "constant"}, 3), ({"anneal": "inverse_power"}, 3)],
        "drop": [({"drop": "per_sign"}, 3)],
        "grow": [({"grow": "random"}, 3), ({"grow": "momentum"}, 3)],
        "redistribute": [
            ({"redistribute": "momentum"}, 3),
            ({"redistribute": "magnitude"}, 6),
            ({"redistribute": "nonzeros"}, 3, {"redistribute": "momentum"}),
        ],
        "decay": [({"decay": 0.0}, 3, {"grow": "momentum"}), ({"decay": 0.5}, 3, {"redistribute": "momentum"})],
        "allocate": [({"allocate": "er"}, 0), ({"allocate": "uniform"}, 0)],
        "regrow_dropped": [({"regrow_dropped": "forbid"}, 3), ({"regrow_dropped": "reset"}, 6)],
        "timing": [({"timing": "instead"}, 3)],
    },
}


Means = dict[str, Array]
"""Running means of gradients, by weight."""


def without_smallest_of_each_sign(run: Program, n: str, fraction: float, policy: str) -> Array:
    active, chosen = run.active(n), []
    for of_sign in (active[run.w[n][active] > 0], active[run.w[n][active] < 0]):
        k = int(np.ceil(fraction * of_sign.size - 1e-9))
        chosen.append(top(np.abs(run.w[n]), of_sign.size - k, of_sign))
    return only(run, n, np.concatenate(chosen))


DROPS: dict[str, Callable[[Program, str, float, str], Array]] = {
    "lowest": without_smallest,
    "per_sign": without_smallest_of_each_sign,
}
GROWTHS: dict[str, Callable[[Program, Arrays, Means], Pick]] = {
    "random": lambda run, g, ema: at_random(run),
    "gradient": lambda run, g, ema: lambda n, candidates, count: top(np.abs(g[n]), count, candidates),
    "momentum": lambda run, g, ema: lambda n, candidates, count: top(np.abs(ema[n]), count, candidates),
}
STATISTICS: dict[str, Callable[[Program, Means, str], float]] = {
    "momentum": lambda run, ema, n: float(np.abs(ema[n][run.mask[n]]).mean()),
    "magnitude": lambda run, ema, n: float(np.abs(run.w[n][run.mask[n]]).mean()),
    "nonzeros": lambda run, ema, n: float(np.count_nonzero(run.w[n][run.mask[n]])),
}


def paper(name: str, options: dict[str, Any], kind: str, seed: int) -> History:
    """Drop a share of each layer, share out what is lost, grow."""
    o = PAPERS[name] | options
    run = start(kind, seed, lambda run: counts_of(run, o), o["regrow_dropped"])
    ema = {n: np.zeros_like(run.w[n]) for n in run.sparse}

    def observe(run: Program, g: Arrays) -> None:
        ema.update({n: o["decay"] * ema[n] + (1 - o["decay"]) * g[n] for n in run.sparse})

    def update(run: Program, g: Arrays) -> None:
        fraction, policy = annealed(o, run.step), o["regrow_dropped"]
        kept = {n: DROPS[o["drop"]](run, n, fraction, policy) for n in run.sparse}
        counts = losses(run, kept)
        if o["redistribute"] is not None:
            shares = [STATISTICS[o["redistribute"]](run, ema, n) for n in run.sparse]
            counts = share_out(shares, sum(counts), [free(run, n, kept[n], policy).size for n in run.sparse])
        place(run, kept, policy, counts, GROWTHS[o["grow"]](run, g, ema))

    return history(run, kind, lambda step: regular(o, step), update, o["timing"], observe)


RUNS: list[tuple[str, dict[str, Any]]] = [
    ("rigl", {}),
    ("rigl", {"timing": "after"}),
    ("rigl", {"density": 0.8, "fraction": 0.9, "anneal": "constant", "regrow_dropped": "forbid"}),
    ("rigl", {"anneal": "linear", "regrow_dropped": "reset", "fraction": 0.7}),
    ("rigl", {"interval": 1, "begin": 2, "allocate": "uniform"}),
    ("set", {}),
    ("set", {"drop": "per_sign"}),
    ("set", {"timing": "instead", "anneal": "cosine"}),
    ("snfs", {}),
    ("snfs", {"redistribute": "magnitude"}),
    ("snfs", {"redistribute": "nonzeros", "density": 0.85}),
    ("snfs", {"redistribute": "momentum", "density": 0.85}),
    ("snfs", {"redistribute": None}),
    ("snfs", {"decay": 0.5, "timing": "instead"}),
    ("dst", {}),
    ("dst", {"grow": "momentum", "decay": 0.5, "drop": "per_sign"}),
    ("dst", {"grow": "random", "redistribute": "momentum", "density": 0.85}),
]


@pytest.mark.parametrize("kind", ["mlp", "conv"])
@pytest.mark.parametrize(("name", "options"), RUNS, ids=lambda v: v if isinstance(v, str) else "-".join(map(str, v)))
def test_a_run_is_that_of_the_paper(name: str, options: dict[str, Any], kind: str) -> None:
    """Properties 1, 9, 10, 11, 24, 26, 27 and 34: topologies, values and momentum over a whole run."""
    options = SHORT[name] | options
    for seed in range(3):
        assert_same(actual(library(name, options), kind, seed), paper(name, options, kind, seed))


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
    for option in set(given) & {"begin", "interval", "fraction", "decay", "regrow_dropped", "timing"}:
        # None is "what the method's parts say" of an option that they may not have.
        assert given[option].default in (PAPERS[name][option], None), option
    assert_same(actual(library(name, SHORT[name])), paper(name, SHORT[name], "mlp", 0))


def sparse_start(seed: int) -> Program:
    """What RigL starts from at a density of 0.4."""
    return start("mlp", seed, lambda run: counts_of(run, PAPERS["rigl"] | {"density": 0.4}))


@pytest.mark.parametrize("policy", ["keep", "reset", "forbid"])
def test_the_published_drop_and_grow_example(policy: Regrow) -> None:
    """Property 7, reference vector, through a real optimizer; momentum follows the value."""
    w = torch.tensor([0.5, -0.1, 0, 0.3, 0, -0.9, 0.2, 0]).double()
    g = torch.tensor([0.1, -0.9, 0.4, 0.2, -0.7, 0.3, 0.05, 0.6]).double()
    model = nn.Linear(8, 1, bias=False).double()
    optimizer = sgd(model, weight_decay=0)
    update = drop_and_grow(
        schedules.constant(0.4), lowest(magnitude), growth.highest(growth.gradient), regrow_dropped=policy
    )
    start = Start(lambda weights, probe: weights[0].rewire(Topology((1, 8), torch.tensor([0, 1, 3, 5, 6]))))
    regrow.sparsify(model, optimizer, Method("m", start, every(2, update, until=3), needs=Need.GRADIENT))
    model(torch.ones(8).double()).backward()
    optimizer.step()
    with torch.no_grad():
        model.weight[0] = w
    optimizer.zero_grad()
    model(g).backward()
    optimizer.step()
    stays = {"keep": [0, 1, 3, 5], "reset": [0, 3, 5], "forbid": [0, 3, 5]}[policy]
    expected_w, expected_v = torch.zeros(8).double(), torch.zeros(8).double()
    expected_w[stays], expected_v[stays] = w[stays], 1.0
    active = {"forbid": [0, 3, 4, 5, 7]}.get(policy, [0, 1, 3, 4, 5])
    assert torch.equal(model.weight[0], expected_w)
    assert torch.equal(optimizer.state[model.weight]["momentum_buffer"][0], expected_v)
    assert torch.equal(model.weight.grad[0][stays], g[stays])
    model.zero_grad()
    model(g).backward()
    assert model.weight.grad[0].nonzero().view(-1).tolist() == active


def one_update(
    seed: int, timing: str = "instead", weight_decay: float = 0.0, scale: float = 1.0, clip: bool = False
) -> Arrays:
    model = network("mlp", seed)
    optimizer = sgd(model, weight_decay)
    method = RECIPES["rigl"](0.4, until=9, begin=1, fraction=0.5, timing=timing)
    sparsifier = regrow.sparsify(model, optimizer, method, seed=seed)
    backward(model, batches("mlp", seed)[0], scale)
    if clip:
        nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    optimizer.step()
    return masks(sparsifier)


@pytest.mark.parametrize("seed", range(5))
def test_growth_ranks_finite_differences(seed: int) -> None:
    """Property 26: brute-force top-k of a dense gradient that no autograd has touched."""
    program = sparse_start(seed)
    batch = batches("mlp", seed)[0]

    def loss_with(name: str, values: Array) -> float:
        everything = {
            n: torch.from_numpy(values if n == name else w).view(program.shapes[n]) for n, w in program.w.items()
        }
        return float(
            nn.functional.cross_entropy(torch.func.functional_call(program.model, everything, (batch[0],)), batch[1])
        )

    found = one_update(seed)
    for n in program.sparse:
        h = 1e-6
        shifts = np.eye(program.w[n].size) * h
        slope = [(loss_with(n, program.w[n] + s) - loss_with(n, program.w[n] - s)) / (2 * h) for s in shifts]
        active = np.flatnonzero(program.mask[n])
        kept = top(np.abs(program.w[n]), active.size - active.size // 2, active)
        grown = top(np.abs(slope), active.size // 2, np.setdiff1d(np.arange(program.w[n].size), kept))
        assert set(np.flatnonzero(found[n])) == set(kept) | set(grown)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "changed", [{"weight_decay": 0.5}, {"scale": 2.0**12}, {"scale": 2.0**-12}, {"clip": True}], ids=str
)
def test_decay_scale_and_clipping_do_not_change_the_choice(changed: dict[str, Any], seed: int) -> None:
    """Property 26."""
    plain, other = one_update(seed), one_update(seed, **changed)
    assert all((plain[n] == other[n]).all() for n in plain)


@pytest.mark.parametrize("name", ["rigl", "set", "snfs", "gmp"])
def test_instead_leaves_everything_but_the_topology(name: str) -> None:
    """Property 24: survivors, biases and their momentum are as before the step; the clock goes on."""
    model = network("mlp", 0)
    optimizer = sgd(model)
    method = library(name, SMALL | {"timing": "instead"})
    sparsifier = regrow.sparsify(model, optimizer, method)
    for step, batch in enumerate(batches("mlp", 0)[:3], start=1):
        old, before = masks(sparsifier), {n: p.detach().clone() for n, p in model.named_parameters()}
        momentum = {n: s["momentum_buffer"].clone() for n, p in model.named_parameters() if (s := optimizer.state[p])}
        backward(model, batch)
        optimizer.step()
        assert sparsifier.step == step
    for n, p in model.named_parameters():
        stays = torch.from_numpy(old[n] & masks(sparsifier)[n]).view(p.shape) if n in old else torch.ones_like(p)
        assert torch.equal(p, before[n] * stays)
        assert torch.equal(optimizer.state[p]["momentum_buffer"], momentum[n] * stays)


@pytest.mark.parametrize("seed", range(3))
def test_after_drops_stepped_weights_and_grows_by_the_gradient_before(seed: int) -> None:
    """Property 24: the two timings read different weights and the same gradient."""
    program = sparse_start(seed)
    batch = batches("mlp", seed)[0]
    g = program.gradients(batch)
    found = one_update(seed, timing="after", weight_decay=WEIGHT_DECAY)
    for n in program.sparse:
        stepped = program.w[n] - LR * (g[n] * program.mask[n] + WEIGHT_DECAY * program.w[n])
        active = np.flatnonzero(program.mask[n])
        kept = top(np.abs(stepped), active.size - active.size // 2, active)
        grown = top(np.abs(g[n]), active.size // 2, np.setdiff1d(np.arange(g[n].size), kept))
        assert set(np.flatnonzero(found[n])) == set(kept) | set(grown)


@pytest.mark.parametrize("name", ["rigl", "set"])
def test_adam_newcomers_start_with_a_second_moment(name: str) -> None:
    """Properties 11 and 12: first moment 0, second the layer's mean or the (biased) square of its gradient."""
    model = network("mlp", 0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    method = RECIPES[name](0.4, until=9, interval=5, fraction=0.5, timing="instead")
    sparsifier = regrow.sparsify(model, optimizer, method)
    for batch in batches("mlp", 0)[:5]:
        old = masks(sparsifier)
        state = {n: {k: v.clone() for k, v in optimizer.state[p].items()} for n, p in model.named_parameters()}
        backward(model, batch)
        g = {n: p.grad.clone().numpy().ravel() for n, p in model.named_parameters()}
        optimizer.step()
    for n, p in ((n, p) for n, p in model.named_parameters() if n in old):
        new = masks(sparsifier)[n]
        first, second = (optimizer.state[p][k].numpy().ravel() for k in ("exp_avg", "exp_avg_sq"))
        before = {k: v.numpy().ravel() for k, v in state[n].items() if v.dim()}
        stay, fresh = new & old[n], new & ~old[n]
        assert fresh.any()
        assert (first[stay] == before["exp_avg"][stay]).all()
        assert (second[stay] == before["exp_avg_sq"][stay]).all()
        assert not first[~stay].any()
        assert not second[~new].any()
        typical = before["exp_avg_sq"][old[n]].mean()
        biased = (1 - 0.999 ** float(state[n]["step"])) * g[n][fresh] ** 2
        start = np.maximum(typical, biased) if name == "rigl" else typical
        np.testing.assert_allclose(second[fresh], start, rtol=1e-12)


REFUSED: list[tuple[list[str], dict[str, Any], str]] = [
    (list(PAPERS), {"density": 0.0}, r"density must lie in \(0, 1\], got 0"),
    (list(PAPERS), {"density": 1.5}, r"density must lie in \(0, 1\], got 1.5"),
    (list(PAPERS), {"density": float("nan")}, r"density must lie in \(0, 1\], got nan"),
    (list(PAPERS), {"fraction": -0.1}, r"the drop fraction must lie in \[0, 1\], got -0.1"),
    (list(PAPERS), {"fraction": 1.1}, r"the drop fraction must lie in \[0, 1\], got 1.1"),
    (list(PAPERS), {"regrow_dropped": "yes"}, "regrow_dropped must be one of keep, reset, forbid, got 'yes'"),
    (list(PAPERS), {"timing": "before"}, "timing must be one of instead, after, got 'before'"),
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


@pytest.mark.parametrize("name", PAPERS)
@pytest.mark.parametrize(
    "change", [{"until": 3}, {"until": -1}, {"interval": 0}, {"begin": -2}, {"begin": 13}], ids=str
)
def test_times_at_which_nothing_happens_are_refused(name: str, change: dict[str, int]) -> None:
    """Property 48."""
    with pytest.raises(ValueError, match=r"begin|until|interval"):
        RECIPES[name](**(SHORT[name] | change))


@pytest.mark.parametrize("name", PAPERS)
def test_a_dynamic_method_requires_until(name: str) -> None:
    with pytest.raises(TypeError, match="required keyword-only argument: 'until'"):
        RECIPES[name](0.1)
