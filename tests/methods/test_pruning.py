"""SNIP and gradual magnitude pruning against plain NumPy runs written from their papers."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch

import regrow
from regrow.methods import RECIPES
from support.cases import EXPLICIT, Changes, cases, require_predicted_difference
from support.loops import loss_of
from support.paper import (
    Arrays,
    History,
    Program,
    actual,
    assert_same,
    backward,
    batches,
    counts_of,
    history,
    keep_largest,
    library,
    masks,
    network,
    progress,
    regular,
    sgd,
    shared,
    start,
    total_of,
)

PAPERS: dict[str, dict[str, Any]] = {
    "snip": {"allocate": "globally"},
    "gmp": {"begin": 0, "interval": 1000, "allocate": "uniform", "timing": "after"},
}
SHORT: dict[str, dict[str, Any]] = {
    "snip": {"density": 0.3},
    "gmp": {"density": 0.3, "until": 13, "interval": 3},
}
CASES: dict[str, dict[str, Changes]] = {
    "snip": {
        "density": [({"density": 0.5}, 1), ({"density": None, "allocate": EXPLICIT}, 1)],
        "allocate": [({"allocate": "uniform"}, 1), ({"allocate": "erk"}, 1)],
    },
    "gmp": {
        "density": [({"density": 0.5}, 3)],
        "until": [({"until": 7}, 3), ({"until": 40}, 3)],
        "begin": [({"begin": 1}, 3), ({"begin": 5}, 3)],
        "interval": [({"interval": 4}, 3), ({"interval": 6}, 3)],
        "allocate": [({"allocate": "erk"}, 3), ({"allocate": "globally"}, 3)],
        "timing": [({"timing": "instead"}, 3)],
    },
}


def by_sensitivity(run: Program, gradients: Arrays, o: dict[str, Any]) -> None:
    """Keep the largest |w g|."""
    score = {n: np.abs(run.w[n] * gradients[n]) for n in run.sparse}
    if isinstance(o["allocate"], dict):
        keep_largest(run, counts_of(run, o), score)
    else:
        keep_largest(run, shared(run, o["allocate"], total_of(run, o["density"]), run.sparse, score), score)


def paper(name: str, options: dict[str, Any], kind: str, seed: int) -> History:
    o, run = PAPERS[name] | options, start(kind, seed)
    if name == "snip":
        return history(run, kind, lambda step: step == 1, lambda run, g: by_sensitivity(run, g, o), "instead")

    def prune(run: Program, g: Arrays) -> None:
        density = o["density"] + (1 - o["density"]) * (1 - progress(o, run.step)) ** 3
        keep_largest(run, shared(run, o["allocate"], total_of(run, density), run.sparse))

    return history(run, kind, lambda step: regular(o, step) or step == o["until"], prune, o["timing"])


RUNS: list[tuple[str, dict[str, Any]]] = [
    ("snip", {}),
    ("snip", {"allocate": "uniform"}),
    ("gmp", {}),
    ("gmp", {"allocate": "erk"}),
    ("gmp", {"allocate": "globally", "timing": "instead"}),
    ("gmp", {"interval": 5, "begin": 2}),
]


@pytest.mark.parametrize("kind", ["mlp", "conv"])
@pytest.mark.parametrize(("name", "options"), RUNS, ids=str)
def test_a_run_is_that_of_the_paper(name: str, options: dict[str, Any], kind: str) -> None:
    """Properties 1, 9, 22, 24 and 30: topologies, values and momentum over a whole run."""
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
    for option in set(PAPERS[name]) - {"allocate"}:
        assert given[option].default == PAPERS[name][option], option
    assert_same(actual(library(name, SHORT[name]), "mlp", 3), paper(name, SHORT[name], "mlp", 3))


def test_snip_leaves_values_and_step_counts_alone() -> None:
    """Property 30: survivors keep the initial values, and no optimizer step has happened."""
    model = network("mlp", 1)
    optimizer = sgd(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    sparsifier = regrow.sparsify(model, optimizer, RECIPES["snip"](0.25))
    assert not sparsifier.started
    backward(model, batches("mlp", 1)[0])
    optimizer.step()
    kept = masks(sparsifier)
    total = sum(m.size for m in kept.values())
    assert sum(int(m.sum()) for m in kept.values()) == int(0.25 * total + 0.5)
    assert not any(optimizer.state[p] for p in model.parameters())
    for n, p in model.named_parameters():
        assert torch.equal(p, before[n] * torch.from_numpy(kept[n]).view(p.shape) if n in kept else before[n])


def test_snip_of_several_batches_ranks_their_mean_gradient() -> None:
    """Property 30: the order of batches is irrelevant, weight decay is not in the score."""
    data = batches("mlp", 2)[:3]
    program = start("mlp", 2)
    sums = [program.gradients(batch) for batch in data]
    together = {n: sum(g[n] for g in sums) for n in program.sparse}
    by_sensitivity(program, together, PAPERS["snip"] | {"density": 0.3})
    for order in (data, data[::-1]):
        model = network("mlp", 2)
        sparsifier = regrow.sparsify(model, sgd(model), RECIPES["snip"](0.3), batches=order, loss=loss_of)
        assert all((m == program.mask[n]).all() for n, m in masks(sparsifier).items())
        assert all(p.grad is None for p in model.parameters())


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    *(
        (name, {"density": density}, rf"density must lie in \(0, 1\], got {density:g}")
        for name in PAPERS
        for density in (0.0, 1.5, float("nan"))
    ),
    ("gmp", {"timing": "before"}, "timing must be one of instead, after, got 'before'"),
]


@pytest.mark.parametrize(("name", "change", "told"), REFUSED)
def test_a_wrong_value_is_refused_by_name(name: str, change: dict[str, Any], told: str) -> None:
    """Property 48."""
    with pytest.raises(ValueError, match=f"^{name}: {told}"):
        RECIPES[name](**(SHORT[name] | change))


@pytest.mark.parametrize(
    "change", [{"until": 3}, {"until": -1}, {"interval": 0}, {"begin": -2}, {"begin": 13}], ids=str
)
def test_times_at_which_nothing_happens_are_refused(change: dict[str, int]) -> None:
    """Property 48."""
    with pytest.raises(ValueError, match=r"begin|until|interval"):
        RECIPES["gmp"](**(SHORT["gmp"] | change))
