"""What a sparsifier shows and counts: its table, its state of sparsity, what was explored."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from regrow import methods, sparsify
from regrow.core.method import Need
from regrow.parts.allocation import explicit, uniform
from support.loops import (
    masks,
    rigl,
    start,
    train,
)
from support.table import METHODS


def test_the_table_shows_every_layer():
    model, opt, sparsifier = start(rigl()._replace(needs=Need.GRADIENT | Need.EXPLORED), skip="2")
    train(model, opt, 1)
    lines = repr(sparsifier).splitlines()
    assert lines[0] == "rigl: 50.0000% of 60 entries active, step 1, 0 updates"
    assert lines[1].split() == ["layer", "shape", "density", "active", "storage", "explored"]
    assert lines[2].split() == ["0.weight", "10", "x", "6", "0.5000", "30", "masked", "0.500"]
    assert lines[3].split() == ["2.weight", "4", "x", "10", "1", "40", "dense:", "skipped"]
    assert lines[4] == "sparse: 30 of 60 entries; dense: 40 (40 skipped)"
    assert (sparsifier.nnz, sparsifier.numel, sparsifier.density, sparsifier.explored) == (30, 60, 0.5, 0.5)


def test_layers_that_are_alike_share_a_line():
    """A line for each kind of layer, however deep the model; counts are sums, densities the ends of their range."""
    model = nn.Sequential(*[nn.Linear(6, 6) for _ in range(12)], nn.Linear(6, 2), nn.Linear(2, 2))
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    allocate = explicit({"0": 0.25, "7": 0.75}, rest=uniform)
    sparsifier = sparsify(model, opt, methods.static(0.5, allocate=allocate), skip="13")
    lines = [line.split() for line in repr(sparsifier).splitlines()[2:]]
    alike = [t.nnz for name, t in sparsifier.topologies.items() if name != "12.weight"]
    assert lines[0] == ["0-11.weight", "12", "of", "6", "x", "6", "0.2500-0.7500", str(sum(alike)), "masked"]
    assert [line[0] for line in lines] == ["0-11.weight", "12.weight", "13.weight", "sparse:"]


def test_the_table_says_when_a_model_is_not_yet_sparse():
    model, opt, sparsifier = start(methods.snip(0.5))
    assert repr(sparsifier).startswith("snip: not yet sparse")
    assert sparsifier.due and not sparsifier.started
    train(model, opt, 1)
    assert repr(sparsifier).startswith("snip: 50.0000% of 100 entries active, step 1")
    assert not sparsifier.due


@pytest.mark.parametrize("method", ["rigl", "rigl-after", "set", "snfs", "gmp", "snip"])
def test_explored_is_the_union_of_all_topologies(method: str):
    """Property 33."""
    recipe = METHODS[method]()
    model, opt, sparsifier = start(recipe._replace(needs=recipe.needs | Need.EXPLORED))
    union = {n: torch.zeros_like(m) for n, m in masks(sparsifier).items()}
    rates = []
    for step in range(1, 27):
        if sparsifier.started:
            union = {n: m | masks(sparsifier)[n] for n, m in union.items()}
            rates.append(sum(int(m.sum()) for m in union.values()) / 100)
            assert sparsifier.explored == rates[-1]
        train(model, opt, step)
    assert rates == sorted(rates)
    assert rates[0] == {"gmp": 1.0}.get(method, 0.2)
    assert (rates[-1] > rates[0]) == (method in ("rigl", "rigl-after", "set", "snfs"))


def test_explored_is_not_kept_unless_asked_for():
    model, opt, sparsifier = start(rigl(interval=1))
    train(model, opt, 1)
    assert sparsifier.explored is None
    assert not any(w.state for w in sparsifier.weights)
