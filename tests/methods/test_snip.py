"""SNIP against a plain NumPy run written from its paper."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch

import regrow
from regrow.methods import BY_NAME
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
    meant,
    network,
    sgd,
    shared,
    start,
    total_of,
)

PAPERS: dict[str, dict[str, Any]] = {"snip": {"allocate": "globally", "structure": None}}
SHORT: dict[str, dict[str, Any]] = {"snip": {"density": 0.3}}
CASES: dict[str, dict[str, Changes]] = {
    "snip": {
        "density": [({"density": 0.5}, 1), ({"density": None, "allocate": EXPLICIT}, 1)],
        "allocate": [({"allocate": "uniform"}, 1), ({"allocate": "erk"}, 1)],
        "structure": [({"structure": s}, 1) for s in ("fives", "tiles", "rows")],
    },
}


def by_sensitivity(run: Program, gradients: Arrays, o: dict[str, Any]) -> None:
    """Keep the largest |w g|."""
    score = {n: run.pooled(n, np.abs(run.w[n] * gradients[n])) for n in run.sparse}
    if isinstance(o["allocate"], dict):
        keep_largest(run, counts_of(run, o), score)
    else:
        keep_largest(run, shared(run, o["allocate"], total_of(run, o["density"]), run.sparse, score), score)


def paper(name: str, options: dict[str, Any], kind: str, seed: int) -> History:
    o = PAPERS[name] | options
    run = start(kind, seed, structure=o["structure"])
    return history(run, kind, lambda step: step == 1, lambda run, g: by_sensitivity(run, g, o), "instead")


RUNS: list[dict[str, Any]] = [{}, {"allocate": "uniform"}, {"allocate": "layer_adaptive"}]


@pytest.mark.parametrize("kind", ["mlp", "conv"])
@pytest.mark.parametrize("options", RUNS, ids=str)
def test_a_run_is_that_of_the_paper(options: dict[str, Any], kind: str) -> None:
    """Properties 1, 9, 24 and 30: topologies, values and momentum over a whole run."""
    options = SHORT["snip"] | options
    for seed in range(3):
        assert_same(actual(library("snip", options), kind, seed), paper("snip", options, kind, seed))


@pytest.mark.parametrize(("name", "change", "first", "both"), cases(CASES))
def test_an_option_makes_the_difference_that_is_predicted(
    name: str, change: dict[str, Any], first: int, both: dict[str, Any]
) -> None:
    """Property 48."""
    require_predicted_difference(name, paper, SHORT[name], change, first, both)


def test_what_is_not_given_is_the_papers() -> None:
    """Property 48: a default is an option value too."""
    given = inspect.signature(BY_NAME["snip"]).parameters
    assert given["allocate"].default == meant("allocate", PAPERS["snip"]["allocate"])
    assert_same(actual(library("snip", SHORT["snip"]), "mlp", 3), paper("snip", SHORT["snip"], "mlp", 3))


def test_snip_leaves_values_and_step_counts_alone() -> None:
    """Property 30: survivors keep the initial values, and no optimizer step has happened."""
    model = network("mlp", 1)
    optimizer = sgd(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    sparsifier = regrow.sparsify(model, optimizer, BY_NAME["snip"](0.25))
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
        sparsifier = regrow.sparsify(model, sgd(model), BY_NAME["snip"](0.3), batches=order, loss=loss_of)
        assert all((m == program.mask[n]).all() for n, m in masks(sparsifier).items())
        assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("density", [0.0, 1.5, float("nan")])
def test_a_wrong_density_is_refused_by_name(density: float) -> None:
    """Property 48."""
    with pytest.raises(ValueError, match=rf"^snip: density must lie in \(0, 1\], got {density:g}"):
        BY_NAME["snip"](density)
