"""Optimizers that are given a closure: the same run, several evaluations, and what a closure excludes."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from regrow import methods, sparsify
from support.loops import (
    data,
    loss_of,
    masks,
    mlp,
    require_zero_outside,
    rigl,
    same,
    start,
)
from support.table import METHODS


def closure_for(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, data(step))
        loss.backward()
        return loss.detach()

    return closure


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("method", ["rigl-after", "set", "snfs", "gmp"])
def test_a_closure_gives_the_same_run(method: str, by_name: bool):
    runs = []
    for with_closure in (False, True):
        model, opt, sparsifier = start(METHODS[method]())
        for step in range(1, 10):
            closure = closure_for(model, opt, step)
            if with_closure:
                opt.step(closure=closure) if by_name else opt.step(closure)
            else:
                closure()
                opt.step()
        assert sparsifier.step == 9 and sparsifier.updates == 2
        runs.append((masks(sparsifier), dict(model.state_dict())))
    assert same(runs[0][0], runs[1][0]) and same(runs[0][1], runs[1][1])


@pytest.mark.parametrize("method", ["rigl-after", "set", "snfs", "gmp"])
def test_lbfgs(method: str):
    """Property 1 with an optimizer that evaluates the closure several times."""
    model = mlp()
    opt = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)
    sparsifier = sparsify(model, opt, METHODS[method]())
    counts = set()
    for step in range(1, 27):
        opt.step(closure_for(model, opt, step))
        require_zero_outside(model, opt, sparsifier)
        counts.add(sum(int(m.sum()) for m in masks(sparsifier).values()))
    target = math.floor(0.2 * 100 + 0.5)
    assert min(counts) == target
    assert len(counts) == 1 or method == "gmp"
    assert sparsifier.step == 26


@pytest.mark.parametrize("optimizer", ["sgd", "lbfgs"])
def test_a_closure_and_an_update_instead_of_the_step_exclude_each_other(optimizer: str):
    model = mlp()
    make = {"sgd": torch.optim.SGD, "lbfgs": torch.optim.LBFGS}[optimizer]
    opt = make(model.parameters(), lr=0.1)
    sparsifier = sparsify(model, opt, rigl(interval=2))
    opt.step(closure_for(model, opt, 1))
    before = copy.deepcopy(model.state_dict()), masks(sparsifier)
    with pytest.raises(ValueError, match=r"step 2.*timing=\"after\""):
        opt.step(closure_for(model, opt, 2))
    assert same(model.state_dict(), before[0]) and same(masks(sparsifier), before[1])
    assert sparsifier.step == 1 and sparsifier.updates == 0


def test_a_closure_and_a_start_that_needs_a_gradient_exclude_each_other():
    model, opt, _ = start(methods.snip(0.5))
    with pytest.raises(ValueError, match="batches= and loss="):
        opt.step(closure_for(model, opt, 1))
