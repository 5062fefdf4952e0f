"""Optimizers that are given a closure: the same run, several evaluations, and what a closure excludes."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from regrow import sparsify
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
@pytest.mark.parametrize("method", ["rigl", "rigl-after", "set", "snfs", "gmp", "snip"])
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
        assert sparsifier.step == 9 and sparsifier.updates == (0 if method == "snip" else 2)
        runs.append((masks(sparsifier), dict(model.state_dict())))
    assert same(runs[0][0], runs[1][0]) and same(runs[0][1], runs[1][1])


@pytest.mark.parametrize("method", ["rigl", "rigl-after", "set", "snfs", "gmp", "snip"])
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
def test_an_update_that_replaces_a_step_has_the_gradients_of_its_closure(optimizer: str):
    """The closure is called once for them; the optimizer gets its loss and no gradient, and changes nothing."""
    model = mlp()
    make = {"sgd": torch.optim.SGD, "lbfgs": torch.optim.LBFGS}[optimizer]
    opt = make(model.parameters(), lr=0.1)
    sparsifier = sparsify(model, opt, rigl(interval=2))
    opt.step(closure_for(model, opt, 1))
    before, calls = copy.deepcopy(model.state_dict()), []

    def counted() -> Tensor:
        calls.append(closure_for(model, opt, 2)())
        return calls[-1]

    assert opt.step(counted) is calls[0]
    assert len(calls) == 1
    assert (sparsifier.step, sparsifier.updates) == (2, 1)
    kept = {n: (v != 0) & (before[n] != 0) for n, v in model.state_dict().items()}
    assert all(torch.equal(v[kept[n]], before[n][kept[n]]) for n, v in model.state_dict().items())
    assert all(p.grad is not None for p in model.parameters())


def test_a_second_optimizer_with_a_closure_joins_an_update_that_replaces_the_step():
    model = mlp()
    opts = [torch.optim.SGD([*layer.parameters()], lr=0.1) for layer in (model[0], model[2])]
    sparsifier = sparsify(model, opts, rigl(interval=1))
    loss_of(model, data(1)).backward()
    before = copy.deepcopy(model.state_dict())
    opts[0].step()
    opts[1].step(lambda: loss_of(model, data(1)).detach())
    assert (sparsifier.step, sparsifier.updates) == (1, 1)
    assert same({"bias": model[2].bias}, {"bias": before["2.bias"]})


def test_a_closure_that_raises_where_an_update_is_due_counts_nothing():
    model, opt, sparsifier = start(rigl(interval=1))

    def fails() -> Tensor:
        raise OSError("the data is gone")

    before = copy.deepcopy(model.state_dict()), masks(sparsifier)
    with pytest.raises(OSError, match="gone"):
        opt.step(fails)
    assert same(model.state_dict(), before[0]) and same(masks(sparsifier), before[1])
    assert (sparsifier.step, sparsifier.updates) == (0, 0)
    opt.step(closure_for(model, opt, 1))
    assert (sparsifier.step, sparsifier.updates) == (1, 1)
