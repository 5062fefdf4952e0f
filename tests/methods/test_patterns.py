"""RigL in patterns n:m against plain NumPy runs, and DEEP R in them: the groups keep their counts at every step."""

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
from regrow.parts import by_gradient_where_lost, n_of_m, random_topology, signed, uniform
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
    history,
    in_pattern,
    library,
    meant,
    regular,
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
