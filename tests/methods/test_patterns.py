"""RigL in patterns n:m and on diagonals against plain NumPy runs, and DEEP R in patterns: what counts keep, always."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import regrow
from regrow import methods
from regrow.core.topology import Topology
from regrow.methods import BY_NAME
from regrow.parts import (
    Diagonals,
    Growth,
    by_gradient_where_lost,
    constant,
    diagonals,
    diagonals_at_random,
    gradient,
    highest_diagonals,
    lowest_diagonals,
    magnitude,
    n_of_m,
    random_topology,
    signed,
    uniform,
)
from support.cases import Changes, cases, require_predicted_difference
from support.dynamics import DROPS
from support.fakes import Fake
from support.paper import (
    Array,
    Arrays,
    History,
    Options,
    Program,
    actual,
    annealed,
    assert_same,
    backward,
    batches,
    history,
    in_pattern,
    library,
    meant,
    network,
    regular,
    sgd,
    shared,
    start,
    stream,
    top,
    total_of,
)

PAPERS: dict[str, Options] = {
    "rigl_nm": {
        "n": 2,
        "m": 4,
        "begin": None,
        "interval": 100,
        "fraction": 0.3,
        "anneal": "cosine",
        "drop": "lowest",
        "regrow_dropped": "keep",
        "timing": "instead",
    }
}
SHORT: dict[str, Options] = {"rigl_nm": {"until": 13, "interval": 3}}


def lines_of(run: Program, n: str) -> Array:
    """Flat positions, by output and position of the kernel, along the inputs."""
    shape = run.shapes[n]
    return np.moveaxis(np.arange(run.w[n].size).reshape(shape), 1, -1).reshape(-1, shape[1])


def groups_of(run: Program, n: str, m: int) -> list[Array]:
    return [line[i : i + m] for line in lines_of(run, n) for i in range(0, line.size, m)]


def paper(name: str, options: Options, kind: str, seed: int) -> History:
    o = PAPERS[name] | options
    run = start(kind, seed, keep=o["regrow_dropped"])
    for n, count in zip(run.sparse, shared(run, "uniform", total_of(run, o["n"] / o["m"]), run.sparse), strict=True):
        run.mask[n] = in_pattern(stream(run, n).uniform(run.w[n].size), run.shapes[n], count, o["n"], o["m"])
        run.w[n] = run.w[n] * run.mask[n]

    def update(run: Program, g: Arrays) -> None:
        kept = DROPS[o["drop"]](run, g, annealed(o, run.step), o["regrow_dropped"])
        for n in run.sparse:
            grown = np.zeros_like(kept[n])
            for group in groups_of(run, n, o["m"]):
                lost = int(run.mask[n][group].sum() - kept[n][group].sum())
                grown[top(np.abs(g[n]), lost, group[~kept[n][group]])] = True
            run.change(n, kept[n], grown)

    return history(run, kind, lambda step: regular(o, step), update, o["timing"])


RUNS: list[Options] = [
    {},
    {"n": 1, "fraction": 0.7},
    {"n": 3, "m": 5, "regrow_dropped": "reset", "anneal": "constant", "fraction": 0.9},
    {"n": 1, "m": 2, "drop": "taylor", "timing": "after"},
    {"n": 2, "m": 3, "drop": "per_sign", "begin": 1, "interval": 1},
    {"n": 3, "m": 16},
    {"n": 2, "m": 2},
]


@pytest.mark.parametrize("kind", ["mlp", "conv", "fours"])
@pytest.mark.parametrize("options", RUNS, ids=lambda o: "-".join(map(str, o.values())) or "default")
def test_a_run_is_that_of_the_paper(options: Options, kind: str) -> None:
    """Properties 1, 3, 4, 7 and 24: topologies, values and momentum over a whole run."""
    options = SHORT["rigl_nm"] | options
    for seed in range(3):
        assert_same(actual(library("rigl_nm", options), kind, seed), paper("rigl_nm", options, kind, seed))


CASES: dict[str, dict[str, Changes]] = {
    "rigl_nm": {
        "n": [({"n": 1}, 0)],
        "m": [({"m": 3}, 0)],
        "until": [({"until": 40}, 3), ({"until": 4}, 3)],
        "begin": [({"begin": 1}, 1), ({"begin": 5}, 3)],
        "interval": [({"interval": 4}, 3)],
        "fraction": [({"fraction": 0.7}, 3), ({"fraction": 0.0}, 3)],
        "anneal": [({"anneal": "constant"}, 3), ({"anneal": "linear"}, 3)],
        "drop": [({"drop": "per_sign"}, 3), ({"drop": "global"}, 3)],
        "regrow_dropped": [({"regrow_dropped": "reset"}, 6, {"fraction": 0.7})],
        "timing": [({"timing": "after"}, 6)],
    }
}


@pytest.mark.parametrize(("name", "change", "first", "both"), cases(CASES))
def test_an_option_makes_the_difference_that_is_predicted(
    name: str, change: Options, first: int, both: Options
) -> None:
    """Property 48."""
    require_predicted_difference(name, paper, SHORT[name], change, first, both, "fours")


def test_what_is_not_given_is_the_papers() -> None:
    """Property 48: a default is an option value too."""
    parameters = inspect.signature(BY_NAME["rigl_nm"]).parameters
    defaults = {k: p.default for k, p in parameters.items() if p.default is not p.empty}
    assert defaults == {k: meant(k, v) for k, v in PAPERS["rigl_nm"].items()}


def counts_in_groups(topology: Topology, m: int) -> set[int]:
    """How many entries the groups of a weight have whose inputs `m` divides."""
    lines = topology.mask.movedim(1, -1).reshape(-1, m)
    return set(lines.sum(1).tolist())


def deep_r_in_pattern(n: int, m: int) -> Any:
    """The form of pytorch/ao issue 3222: what would change its sign goes, and its group grows by gradient."""
    method = methods.deep_r(n / m, until=40, l1=1e-3, noise=1e-2, grow=by_gradient_where_lost(m))
    return method._replace(start=signed(random_topology(n / m, uniform, n_of_m(n, m))))


@pytest.mark.parametrize("storage", ["masked", "compressed"])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 4)])
@pytest.mark.parametrize("make", [deep_r_in_pattern, lambda n, m: methods.rigl_nm(n=n, m=m, until=40, interval=2)])
def test_every_group_has_n_entries_at_every_step(make: Any, n: int, m: int, storage: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 12, 2), nn.ReLU(), nn.Flatten(), nn.Linear(48, 4)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sparsifier = regrow.sparsify(model, optimizer, make(n, m), storage=storage)
    first = sparsifier.topologies
    for _ in range(12):
        assert all(counts_in_groups(t, m) == {n} for t in sparsifier.topologies.values())
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(torch.randn(6, 8, 3, 3).double()), torch.randint(0, 4, (6,))).backward()
        optimizer.step()
    assert all(sparsifier.topologies[name] != topology for name, topology in first.items())


def test_a_group_that_lost_nothing_grows_nothing_and_its_gradient_is_not_read() -> None:
    weight = Fake([5, 1, 0, 0, 4, 3, 0, 0, 2, 0], [0, 1, 4, 5, 8], [0, 0, 1, 2, 9, 9, 9, 9, 9, 9])
    read: list[list[int]] = []

    def grads_at(positions: torch.Tensor) -> torch.Tensor:
        read.append(positions.tolist())
        assert weight.grad is not None
        return weight.grad[positions]

    weight.grads_at = grads_at  # type: ignore[attr-defined]
    kept = Topology((1, 10), torch.tensor([0, 4, 5]))
    # The last group has two inputs: what it lost, or the other one.
    assert by_gradient_where_lost(4)(weight, kept, 2).tolist() == [3, 8]  # type: ignore[arg-type]
    assert read == [[1, 2, 3, 8, 9]]


def test_what_cannot_keep_the_pattern_is_refused() -> None:
    with pytest.raises(ValueError, match="rigl_nm: every group gets back what it lost, and regrow_dropped='forbid'"):
        methods.rigl_nm(until=9, interval=3, regrow_dropped="forbid")
    with pytest.raises(ValueError, match=r"n must lie in \[1, m\], got n = 5 and m = 4"):
        methods.rigl_nm(n=5, m=4, until=9, interval=3)
    with pytest.raises(ValueError, match="a group has at least 1 input, got m = 0"):
        by_gradient_where_lost(0)
    weight = Fake([1, 2, 3, 4], [0, 1], [1, float("inf"), 3, 4])
    weight.grads_at = lambda positions: weight.grad[positions]  # type: ignore
    with pytest.raises(ValueError, match=r"w: by_gradient_where_lost .* 0 entries in all, and 1 are to grow"):
        by_gradient_where_lost(4)(weight, weight.topology, 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"w: 1 of 3 growth scores are not finite"):
        by_gradient_where_lost(4)(weight, Topology((1, 4), torch.tensor([0])), 1)  # type: ignore[arg-type]


# Diagonals


def on_diagonals(run: Program, n: str) -> Array:
    """The diagonal on which each entry lies."""
    rows = run.shapes[n][0]
    i, j = np.indices((rows, run.w[n].size // rows))
    return ((i - j) % i.shape[0] if i.shape[0] >= i.shape[1] else (j - i) % i.shape[1]).ravel()


def best_diagonals(on: Array, score: Array, number: int, among: Array) -> Array:
    return np.isin(on, top(np.bincount(on, score) / np.bincount(on), number, among))


def diagonal_run(o: Options, kind: str, seed: int) -> History:
    run = start(kind, seed, keep=o["regrow_dropped"])
    diagonals_of = {n: on_diagonals(run, n) for n in run.sparse}
    counts = shared(run, "uniform", total_of(run, o["density"]), run.sparse)
    for n, count in zip(run.sparse, counts, strict=True):
        on = diagonals_of[n]
        every, length = np.arange(on.max() + 1), int(np.bincount(on)[0])
        number = min(every[1:], key=lambda k: (abs(k * length - count), k))
        run.mask[n] = best_diagonals(on, stream(run, n).uniform(on.size), number, every)
        run.w[n] = run.w[n] * run.mask[n]

    def update(run: Program, g: Arrays) -> None:
        for n, on in diagonals_of.items():
            active = np.unique(on[run.mask[n]])
            lost = int(annealed(o, run.step) * active.size + 1e-9)
            kept = best_diagonals(on, np.abs(run.w[n]), active.size - lost, active)
            free = np.unique(on[~kept])
            if o["grow"] == "random":
                grown = np.isin(on, free[stream(run, n).subset(free.size, lost)])
            else:
                grown = best_diagonals(on, np.abs(g[n]), lost, free)
            run.change(n, kept, grown)

    return history(run, kind, lambda step: regular(o, step), update, o["timing"])


DIAGONAL_GROWTHS: dict[str, Growth] = {"gradient": highest_diagonals(gradient), "random": diagonals_at_random}


@pytest.mark.parametrize("kind", ["mlp", "conv"])
@pytest.mark.parametrize("storage", ["masked", "compressed"])
@pytest.mark.parametrize(("grow", "keep"), [("gradient", "keep"), ("gradient", "reset"), ("random", "keep")])
def test_a_run_on_diagonals_is_that_of_numpy(grow: str, keep: Any, storage: Any, kind: str) -> None:
    """RigL and SET of whole diagonals, in the storage that holds nothing else."""
    o: Options = {"density": 0.4, "until": 13, "interval": 2, "begin": None, "fraction": 0.6, "anneal": "constant"}
    o |= {"grow": grow, "regrow_dropped": keep, "timing": "instead"}
    method = methods.rigl(
        o["density"],
        until=o["until"],
        interval=o["interval"],
        fraction=o["fraction"],
        anneal=constant,
        drop=lowest_diagonals(magnitude),
        grow=DIAGONAL_GROWTHS[grow],
        regrow_dropped=keep,
    )
    method = method._replace(start=random_topology(o["density"], uniform, diagonals))
    for seed in range(2):
        wanted = diagonal_run(o, kind, seed)
        assert any((wanted.masks[0][n] != wanted.masks[-1][n]).any() for n in wanted.masks[0])
        if storage == "masked":
            assert_same(actual(method, kind, seed), wanted)
            continue
        model = network(kind, seed)
        optimizer = sgd(model)
        sparsifier = regrow.sparsify(model, optimizer, method, seed=seed, storage=storage)
        for step, batch in enumerate(batches(kind, seed)):
            assert all(
                (t.mask.numpy().ravel() == wanted.masks[step][n]).all() for n, t in sparsifier.topologies.items()
            )
            backward(model, batch)
            optimizer.step()
        for weight in sparsifier.weights:
            at = weight.topology.indices.numpy()
            np.testing.assert_allclose(weight.values().numpy(), wanted.trained["value"][weight.name][at], rtol=1e-9)


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4, 4), (1, 6), (6, 1), (2, 3, 2), (0, 4), (4, 0)])
def test_every_entry_lies_on_one_diagonal_and_all_are_of_one_length(shape: tuple[int, ...]) -> None:
    whole = Diagonals.of(shape)
    matrix = torch.arange(np.prod(shape)).view(whole.rows, whole.columns)
    spread = whole.spread(torch.arange(whole.number))
    assert spread.shape == matrix.shape
    assert torch.equal(whole.at(matrix.reshape(-1)).view(matrix.shape), spread)
    if matrix.numel():
        assert spread.reshape(-1).bincount().tolist() == [whole.length] * whole.number
    for rows in range(whole.rows):
        for columns in range(whole.columns):
            # A step along both axes stays on a diagonal where none of them wraps around the shorter side.
            if rows + 1 < whole.rows and columns + 1 < whole.columns:
                assert spread[rows, columns] == spread[rows + 1, columns + 1]
    values = torch.randn(matrix.numel()).double()
    sums = torch.zeros(whole.number, dtype=torch.float64)
    sums += whole.sums(0, values[: values.numel() // 2])
    sums += whole.sums(values.numel() // 2, values[values.numel() // 2 :])
    wanted = [float(values[(spread == d).reshape(-1)].sum()) for d in range(whole.number)]
    np.testing.assert_allclose(sums.numpy(), wanted, rtol=1e-12, atol=1e-14)


def test_what_is_no_whole_diagonal_is_refused() -> None:
    weight = Fake([1.0] * 6, [0, 1, 4], [1.0] * 6)
    weight.shape, weight.topology = (3, 2), Topology((3, 2), torch.tensor([0, 1, 3]))
    held: Any = weight
    told = "w: of 2 active diagonals 1 are not active as a whole: start with random_topology"
    for act in (
        lambda: lowest_diagonals(magnitude)([held], [0.5]),
        lambda: diagonals_at_random(held, weight.topology, 2),
    ):
        with pytest.raises(ValueError, match=told):
            act()
    weight.topology = Topology((3, 2), torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="w: 3 entries are to grow on diagonals of 2, of which 2 are free"):
        highest_diagonals(gradient)(held, weight.topology, 3)
    score = torch.tensor([1.0, 2, 3, 4, -np.inf, -np.inf], dtype=torch.float64)
    with pytest.raises(ValueError, match="w has 1 diagonals all of whose entries are allowed, and 2 are asked for"):
        diagonals(held, score, 4)
    # One entry becomes a diagonal, and three become one: the smaller of two that are equally near.
    assert [diagonals(held, score, count).indices.tolist() for count in (1, 3)] == [[0, 3], [0, 3]]
