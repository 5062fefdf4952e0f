"""SRigL against a NumPy program written from its paper, neuron by neuron."""

from __future__ import annotations

import inspect
import logging
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import regrow
from regrow import methods
from regrow.core.topology import Topology
from regrow.parts import starts
from regrow.parts.schedules import constant
from regrow.parts.structures import fan_ins
from regrow.storage import compressed
from support.cases import cases, require_predicted_difference
from support.fakes import Fake, run, together
from support.paper import (
    Array,
    Arrays,
    History,
    Program,
    actual,
    annealed,
    assert_same,
    backward,
    batches,
    counts_of,
    floor,
    history,
    library,
    masks,
    network,
    regular,
    sgd,
    start,
    stream,
)

PAPERS: dict[str, dict[str, Any]] = {
    "srigl": {
        "begin": None,
        "interval": 100,
        "fraction": 0.3,
        "anneal": "cosine",
        "ablation": 0.3,
        "ablate_last": False,
        "allocate": "erk",
        "timing": "instead",
    }
}
SHORT: dict[str, dict[str, Any]] = {"srigl": {"density": 0.3, "until": 13, "interval": 3}}
DENSITIES = {"0.weight": 0.2, "2.weight": 0.5, "5.weight": 0.75}

CASES: dict[str, dict[str, list[Any]]] = {
    "srigl": {
        "density": [({"density": 0.5}, 0), ({"density": None, "allocate": DENSITIES}, 0)],
        "until": [({"until": 40}, 3), ({"until": 5}, 3)],
        "begin": [({"begin": 1}, 1), ({"begin": 5}, 3)],
        "interval": [({"interval": 4}, 3), ({"interval": 6}, 3)],
        "fraction": [({"fraction": 0.7}, 3), ({"fraction": 0.0}, 3)],
        "ablation": [({"ablation": 0.0}, 3), ({"ablation": 0.9}, 3), ({"ablation": 1.0}, 3)],
        "ablate_last": [({"ablate_last": True}, 3, {"ablation": 0.9, "fraction": 0.7})],
        "anneal": [({"anneal": "constant"}, 3), ({"anneal": "linear"}, 3)],
        "allocate": [({"allocate": "uniform"}, 0), ({"allocate": "er"}, 0)],
        "timing": [({"timing": "after"}, 6)],
    }
}


def equal_fan_ins(score: Array, count: int) -> Array:
    """The best of each row, and of the rows with the best next one as many as the count asks for."""
    order = np.argsort(-score, axis=1, kind="stable")
    each, surplus = divmod(count, len(score))
    mask = np.zeros(score.shape, bool)
    following = [score[o, order[o, each]] if each < score.shape[1] else -math.inf for o in range(len(score))]
    more = np.argsort(-np.array(following), kind="stable")[:surplus]
    for o in range(len(score)):
        mask[o, order[o, : each + (o in more)]] = True
    return mask


def update(w: Array, mask: Array, g: Array, dropped: int, gamma: float, at: Array) -> tuple[Array, Array]:
    """One update of a layer, all (neurons, fan-in): which neurons stay, and the new mask; `at` orders equal scores."""
    n, (neurons, size) = int(mask.sum()), mask.shape
    everywhere = [(o, c) for o in range(neurons) for c in range(size)]
    by_size = sorted((p for p in everywhere if mask[p]), key=lambda p: (-abs(w[p]), at[p]))
    by_slope = sorted(everywhere, key=lambda p: (-abs(g[p]), at[p]))
    largest = set(by_size[: n - dropped])
    salient = largest | set([p for p in by_slope if p not in largest][:dropped])
    counts = [sum(o == p[0] for p in salient) for o in range(neurons)]
    wanted = gamma * n / mask.any(1).sum()
    stays = {o for o in range(neurons) if counts[o] >= wanted - 1e-9}
    if len(stays) < math.ceil(n / size):
        stays = set(sorted(range(neurons), key=lambda o: (-counts[o], o))[: math.ceil(n / size)])
    kept: dict[int, list[Any]] = {o: [] for o in stays}
    for p in [p for p in by_size if p[0] in stays][: n - dropped]:
        kept[p[0]].append(p)
    each, surplus = divmod(n, len(stays))
    fan_in = dict.fromkeys(stays, each)
    over = sorted((o for o in stays if len(kept[o]) > each), key=lambda o: (-abs(w[kept[o][each]]), o))
    for o in over[:surplus]:
        fan_in[o] += 1
    left = surplus - len(over[:surplus])
    candidates = {o: [p for p in by_slope if p[0] == o and p not in kept[o]] for o in stays}
    rest = [o for o in stays if o not in over]
    for o in sorted(rest, key=lambda o: (-abs(g[candidates[o][each - len(kept[o])]]) if left else 0, o))[:left]:
        fan_in[o] += 1
    new = np.zeros_like(mask)
    for o in stays:
        chosen = kept[o][: fan_in[o]]
        chosen += candidates[o][: fan_in[o] - len(chosen)]
        new[tuple(np.array(chosen).reshape(-1, 2).T)] = True
    return np.array([o in stays for o in range(neurons)]), new


def paper(name: str, options: dict[str, Any], kind: str, seed: int) -> History:
    """From equal fan-ins, and with updates that keep them."""
    o, run = PAPERS[name] | options, start(kind, seed)
    for n, count in zip(run.sparse, counts_of(run, o), strict=True):
        score = stream(run, n).uniform(run.w[n].size).reshape(run.shapes[n][0], -1)
        run.mask[n] = equal_fan_ins(score, count).ravel()
        run.w[n] = run.w[n] * run.mask[n]

    def rewire(run: Program, g: Arrays) -> None:
        for n in run.sparse:
            dropped = floor(annealed(o, run.step) * run.mask[n].sum())
            gamma = o["ablation"] if o["ablate_last"] or n != run.sparse[-1] else 0.0
            if dropped:
                layers = [a[n].reshape(run.shapes[n][0], -1) for a in (run.w, run.mask, g)]
                at = np.arange(layers[0].size).reshape(layers[0].shape)
                new = update(*layers, dropped, gamma, at)[1].ravel()
                run.change(n, new & run.mask[n], new)

    return history(run, kind, lambda step: regular(o, step), rewire, o["timing"])


RUNS: list[dict[str, Any]] = [
    {},
    {"timing": "after"},
    {"ablation": 0.0, "fraction": 0.9},
    {"ablation": 0.9, "anneal": "constant", "interval": 1},
    {"ablation": 1.0, "ablate_last": True, "fraction": 0.5, "anneal": "constant", "interval": 2},
    {"density": 0.85, "fraction": 0.9, "ablation": 0.8, "anneal": "linear"},
    {"density": 0.15, "allocate": "uniform", "begin": 2, "fraction": 1.0},
]


@pytest.mark.parametrize("kind", ["mlp", "conv"])
@pytest.mark.parametrize("options", RUNS, ids=lambda v: "-".join(map(str, v.values())))
def test_a_run_is_that_of_the_paper(options: dict[str, Any], kind: str) -> None:
    """Properties 1, 9, 10, 11 and 24: topologies, values and momentum over a whole run."""
    options = SHORT["srigl"] | options
    if kind == "mlp" and options["density"] == 0.15:
        options["density"] = 0.2
    for seed in range(3):
        assert_same(actual(library("srigl", options), kind, seed), paper("srigl", options, kind, seed))


@pytest.mark.parametrize(("name", "change", "first", "both"), cases(CASES))
def test_an_option_makes_the_difference_that_is_predicted(
    name: str, change: dict[str, Any], first: int, both: dict[str, Any]
) -> None:
    """Property 48."""
    require_predicted_difference(name, paper, SHORT[name], change, first, both)


def test_what_is_not_given_is_the_papers() -> None:
    """Property 48: a default is an option value too."""
    given = inspect.signature(methods.srigl).parameters
    for option in set(PAPERS["srigl"]) - {"anneal", "allocate"}:
        assert given[option].default == PAPERS["srigl"][option], option
    assert_same(actual(library("srigl", SHORT["srigl"])), paper("srigl", SHORT["srigl"], "mlp", 0))


@st.composite
def layers(draw: st.DrawFn) -> Fake:
    """A weight of odd shape, either way round, with any topology, and ties among values and gradients."""
    shape = (draw(st.integers(1, 6)), draw(st.integers(1, 6)), *draw(st.lists(st.integers(1, 2), max_size=1)))
    numel = math.prod(shape)
    few = st.sampled_from([-2.0, -1.0, 0.0, 0.5, 1.0, 3.0])
    values, grad = (draw(st.lists(few, min_size=numel, max_size=numel)) for _ in range(2))
    weight = Fake(values, None, grad)
    weight.shape, weight.out_axis = shape, draw(st.integers(0, 1))
    weight.in_axis = 1 - weight.out_axis
    active = sorted(draw(st.sets(st.integers(0, numel - 1))))
    weight.topology = Topology(shape, torch.tensor(active, dtype=torch.int64))
    weight.dense = weight.dense * weight.topology.mask.view(-1)
    return weight


def updated(weight: Fake, fraction: float, gamma: float) -> None:
    method = methods.srigl(
        0.5, until=2, interval=1, fraction=fraction, ablation=gamma, ablate_last=True, anneal=constant
    )
    run(method.update, together(weight))


@given(layers(), st.floats(0, 1), st.floats(0, 1))
def test_an_update_from_any_topology_is_that_of_the_paper(weight: Fake, fraction: float, gamma: float) -> None:
    """Properties 1, 3, 6, 8 and 10: counts exact, fan-ins equal, never empty, whatever came before."""
    old, before = weight.topology, weight.dense.clone()
    numel, dropped = old.numel, math.floor(fraction * old.nnz + 1e-9)
    at = np.moveaxis(np.arange(numel).reshape(weight.shape), weight.out_axis, 0).reshape(
        weight.shape[weight.out_axis], -1
    )
    assert weight.grad is not None
    w, g, mask = weight.dense.numpy()[at], weight.grad.numpy()[at], old.mask.numpy().ravel()[at]
    updated(weight, fraction, gamma)
    assert weight.topology.nnz == old.nnz
    if not dropped:
        assert weight.topology == old
        return
    stays, new = update(w, mask, g, dropped, gamma, at)
    assert (weight.topology.mask.numpy().ravel()[at] == new).all()
    fan = fan_ins(weight.topology, weight.out_axis).numpy()
    assert np.ptp(fan[stays]) <= 1
    assert not fan[~stays].any()
    both = torch.from_numpy((new & mask)[np.argsort(at.ravel()) // at.shape[1], np.argsort(at.ravel()) % at.shape[1]])
    assert torch.equal(weight.dense, before * both)


def one_layer(w: list[list[float]], grad: list[list[float]], active: list[int]) -> Fake:
    weight = Fake(torch.tensor(w), None, torch.tensor(grad))
    weight.shape = (len(w), len(w[0]))
    weight.topology = Topology(weight.shape, torch.tensor(active))
    weight.dense = weight.dense * weight.topology.mask.view(-1)
    return weight


def test_a_neuron_without_salient_entries_goes_and_may_come_back() -> None:
    """The middle neuron is small and sees no gradient; its two entries go to the others. Later it sees the most."""
    w = [[3.0, 4, 0, 0], [0.1, 0.2, 0, 0], [5.0, 6, 0, 0]]
    weight = one_layer(w, [[0, 0, 2, 1], [0, 0, 0, 0], [0, 0, 1, 2.0]], [0, 1, 4, 5, 8, 9])
    updated(weight, 0.4, 0.3)
    assert weight.topology.mask.tolist() == [[True, True, True, False], [False] * 4, [True, True, False, True]]
    assert weight.dense.tolist() == [3, 4, 0, 0, 0, 0, 0, 0, 5, 6, 0, 0]
    weight.grad = torch.tensor([0, 0, 0, 1, 9, 8, 0, 0, 0, 0, 0, 0]).double()
    updated(weight, 0.4, 0.3)
    assert weight.topology.mask.tolist() == [[True, True, False, False]] * 3
    assert weight.dense.tolist() == [3, 4, 0, 0, 0, 0, 0, 0, 5, 6, 0, 0]


def test_as_many_neurons_stay_as_hold_the_entries(caplog: pytest.LogCaptureFixture) -> None:
    """Ablation at its most takes all but one by salience; five entries need two neurons of three."""
    weight = one_layer([[3.0, 3, 3], [2, 0, 0], [1, 0, 0]], [[0.0] * 3, [0, 1, 0], [0, 0.0, 0]], [0, 1, 2, 3, 6])
    with caplog.at_level(logging.INFO, logger="regrow"):
        updated(weight, 0.2, 1.0)
    assert fan_ins(weight.topology, 0).tolist() == [3, 2, 0]
    weight = one_layer([[3.0, 3, 3], [0.1, 0, 0], [0.1, 0, 0]], [[0.0] * 3, [0.0] * 3, [1, 0, 0.0]], [0, 1, 2, 3, 6])
    with caplog.at_level(logging.INFO, logger="regrow"):
        updated(weight, 0.2, 1.0)
    assert fan_ins(weight.topology, 0).tolist() == [3, 2, 0]
    assert "w: 1 of 3 neurons have enough salient entries, and 2 stay to hold its 5" in caplog.text


@pytest.mark.parametrize("storage", ["masked", "compressed"])
def test_fan_ins_stay_equal_through_a_run(storage: Any) -> None:
    """Every layer keeps its count; neurons that are left have as many entries, up to one; some are gone."""
    model = network("conv", 3)
    optimizer = sgd(model)
    method = methods.srigl(0.4, until=30, interval=2, fraction=0.5, ablation=0.7)
    sparsifier = regrow.sparsify(model, optimizer, method, storage=storage)
    first = {n: t.nnz for n, t in sparsifier.topologies.items()}
    gone = 0
    for batch in batches("conv", 3, 30):
        backward(model, batch)
        optimizer.step()
        for n, mask in masks(sparsifier).items():
            shape = sparsifier.topologies[n].shape
            fan = mask.reshape(shape[0], -1).sum(1)
            assert fan.sum() == first[n]
            assert np.ptp(fan[fan > 0]) <= 1
            gone += int((fan == 0).sum())
            assert n != "5.weight" or fan.all()
    assert gone


def test_the_gradient_is_read_in_blocks_of_whole_neurons(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compressed storage never forms it as a whole, and the choice is the same."""
    found = []
    for size, storage in ((1 << 20, "masked"), (1, "compressed"), (40, "compressed")):
        monkeypatch.setattr(compressed, "_BLOCK", size)
        model = network("conv", 0)
        optimizer = sgd(model)
        method = methods.srigl(0.4, until=20, interval=2, fraction=0.5, ablation=0.7)
        sparsifier = regrow.sparsify(model, optimizer, method, storage=storage)
        for batch in batches("conv", 0, 8):
            backward(model, batch)
            optimizer.step()
        found.append(masks(sparsifier))
    assert all((other[n] == found[0][n]).all() for other in found[1:] for n in other)


def test_outputs_on_another_axis_have_equal_fan_ins() -> None:
    """A transposed convolution, in a run: an output is a slice along its second axis."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.ConvTranspose1d(4, 6, 3), nn.Flatten(), nn.Linear(36, 5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = methods.srigl(0.4, until=20, interval=2, fraction=0.5, ablation=0.5)
    sparsifier = regrow.sparsify(model, optimizer, method)
    seen = []
    for _ in range(6):
        optimizer.zero_grad()
        model(torch.randn(7, 4, 4)).square().mean().backward()
        optimizer.step()
        mask = model[0].weight != 0
        seen.append(sparsifier.topologies["0.weight"].mask.sum((0, 2)))
        assert torch.equal(mask.sum((0, 2)) > 0, seen[-1] > 0)
        assert int(seen[-1][seen[-1] > 0].max() - seen[-1][seen[-1] > 0].min()) <= 1
        assert int(seen[-1].sum()) == int(seen[0].sum())


def test_a_fraction_of_zero_changes_nothing() -> None:
    """Property 2."""
    model = network("mlp", 0)
    optimizer = sgd(model)
    method = methods.srigl(0.3, until=9, interval=2, fraction=0.0, ablation=1.0, ablate_last=True)
    sparsifier = regrow.sparsify(model, optimizer, method)
    for step, batch in enumerate(batches("mlp", 0)[:6], start=1):
        before = [masks(sparsifier), [p.detach().clone() for p in model.parameters()]]
        backward(model, batch)
        optimizer.step()
        if step % 2 == 0:
            assert all((m == before[0][n]).all() for n, m in masks(sparsifier).items())
            assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before[1], strict=True))
    assert sparsifier.updates == 3


def test_a_weight_without_gradient_is_left_and_named(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.ModuleList([nn.Linear(6, 5), nn.Linear(6, 5)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = regrow.sparsify(model, optimizer, methods.srigl(0.5, until=9, interval=1, fraction=0.9))
    before = sparsifier.topologies
    model[1](torch.randn(3, 6)).sum().backward()
    optimizer.step()
    assert sparsifier.topologies["0.weight"] == before["0.weight"]
    assert sparsifier.topologies["1.weight"] != before["1.weight"]
    assert "no gradient reached 0.weight" in caplog.text


def test_a_gradient_that_is_not_finite_stops_the_update_before_anything_changes() -> None:
    """Property 5: also where ablation is off and only growth reads it."""
    for gamma in (0.0, 0.5):
        weight = one_layer([[3.0, 4, 0], [1, 2, 0]], [[0, 0, math.inf], [0, 0, math.nan]], [0, 1, 3, 4])
        with pytest.raises(ValueError, match=r"^w: 1 of 5 growth scores are not finite|^w: 2 of 6 growth scores"):
            updated(weight, 0.5, gamma)
        assert weight.rewired == 0


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"density": 0.0}, r"density must lie in \(0, 1\], got 0"),
    ({"density": 1.5}, r"density must lie in \(0, 1\], got 1.5"),
    ({"fraction": -0.1}, r"the drop fraction must lie in \[0, 1\], got -0.1"),
    ({"fraction": 1.1}, r"the drop fraction must lie in \[0, 1\], got 1.1"),
    ({"ablation": -0.5}, r"ablation must lie in \[0, 1\], got -0.5"),
    ({"ablation": 1.5}, r"ablation must lie in \[0, 1\], got 1.5"),
    ({"ablation": math.nan}, r"ablation must lie in \[0, 1\], got nan"),
    ({"timing": "before"}, "timing must be one of instead, after, got 'before'"),
]


@pytest.mark.parametrize(("change", "told"), REFUSED)
def test_a_wrong_value_is_refused_by_name(change: dict[str, Any], told: str) -> None:
    """Property 48."""
    with pytest.raises(ValueError, match=f"^srigl: {told}"):
        methods.srigl(**(SHORT["srigl"] | change))


@pytest.mark.parametrize(
    "change", [{"until": 3}, {"until": -1}, {"interval": 0}, {"begin": -2}, {"begin": 13}], ids=str
)
def test_times_at_which_nothing_happens_are_refused(change: dict[str, int]) -> None:
    """Property 48."""
    with pytest.raises(ValueError, match=r"begin|until|interval"):
        methods.srigl(**(SHORT["srigl"] | change))


def test_a_density_below_one_entry_for_each_neuron_is_refused() -> None:
    """Property 48: with the numbers and the least density, and the model as it was."""
    model = network("mlp", 0)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=r"0.weight has 12 outputs, and its 9 entries leave some without any.*0.125"):
        regrow.sparsify(model, sgd(model), methods.srigl(0.1, until=9, interval=2))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


def test_another_start_is_brought_to_equal_fan_ins_by_the_first_update() -> None:
    """From the pruned weights of a trained model, with the total and each weight's count as they were."""
    model = network("mlp", 1)
    optimizer = sgd(model)
    method = methods.srigl(0.3, until=9, interval=2, ablation=0.0)._replace(start=starts.prune_global(0.3))
    sparsifier = regrow.sparsify(model, optimizer, method)
    first = masks(sparsifier)
    assert any(np.ptp(m.reshape(s, -1).sum(1)) > 1 for m, s in zip(first.values(), (12, 9, 4), strict=True))
    for batch in batches("mlp", 1)[:2]:
        backward(model, batch)
        optimizer.step()
    for (n, mask), neurons in zip(masks(sparsifier).items(), (12, 9, 4), strict=True):
        assert mask.sum() == first[n].sum()
        assert np.ptp(mask.reshape(neurons, -1).sum(1)) <= 1
