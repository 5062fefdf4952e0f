"""What counts as one step: of several optimizers, of subclasses and wrappers, beside schedulers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from regrow import Sparsifier, sparsify
from regrow.core.method import Method, Rule
from regrow.parts.updates import chain, every
from support.loops import (
    MAKE,
    data,
    loss_of,
    masks,
    mlp,
    require_zero_outside,
    rigl,
    same,
    set_,
    start,
    train,
)
from support.table import METHODS


def train_all(model: nn.Module, optimizers: list[torch.optim.Optimizer], step: int) -> None:
    model.zero_grad()
    loss_of(model, data(step)).backward()
    for optimizer in optimizers:
        optimizer.step()


def two(make: Callable[[], Method]) -> tuple[nn.Sequential, list[torch.optim.Optimizer], Sparsifier]:
    model = mlp()
    adam = torch.optim.AdamW([model[0].bias, *model[2].parameters()], lr=0.01)
    opts = [torch.optim.SGD([model[0].weight], lr=0.1, momentum=0.9), adam]
    return model, opts, sparsify(model, opts, make())


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("method", ["rigl", "rigl-after", "set", "snfs", "gmp", "gmp-global", "snip"])
def test_two_optimizers_make_one_step(method: str, order: int):
    model, opts, sparsifier = two(METHODS[method])
    for step in range(1, 27):
        train_all(model, opts[::order], step)
        assert sparsifier.step == step
        for optimizer in opts:
            require_zero_outside(model, optimizer, sparsifier)
    assert sum(int(m.sum()) for m in masks(sparsifier).values()) == 20


def test_an_update_instead_of_the_step_stops_both_optimizers():
    """Property 24."""
    model, opts, sparsifier = two(lambda: rigl(interval=2))
    train_all(model, opts, 1)
    before = copy.deepcopy(model.state_dict()), copy.deepcopy([o.state_dict() for o in opts])
    old = masks(sparsifier)
    train_all(model, opts, 2)
    assert sparsifier.updates == 1
    for name, value in model.state_dict().items():
        stays = old[name] & masks(sparsifier)[name] if name in old else ...
        assert torch.equal(value[stays], before[0][name][stays])
    assert [int(s["step"]) for s in opts[1].state.values()] == [1, 1, 1]
    assert all(p.grad is not None for p in model.parameters())


def test_two_optimizers_get_the_topologies_of_one():
    """The gradients of an update "after" the step are those before any optimizer stepped."""
    runs = []
    for split in (False, True):
        model = mlp()
        groups = [[model[0].weight, model[0].bias], [model[2].weight, model[2].bias]]
        parts = groups if split else [groups[0] + groups[1]]
        opts = [torch.optim.SGD(part, lr=0.1) for part in parts]
        sparsifier = sparsify(model, opts, METHODS["snfs"]())
        for step in range(1, 10):
            train_all(model, opts, step)
        runs.append((masks(sparsifier), dict(model.state_dict())))
    assert same(runs[0][0], runs[1][0]) and same(runs[0][1], runs[1][1])


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_muon_beside_adamw():
    model = mlp()
    matrices, rest = [p for p in model.parameters() if p.dim() == 2], [p for p in model.parameters() if p.dim() == 1]
    opts = [torch.optim.Muon(matrices, lr=0.02, weight_decay=0.1), torch.optim.AdamW(rest, lr=0.01)]
    sparsifier = sparsify(model, opts, rigl(0.4))
    for step in range(1, 20):
        train_all(model, opts, step)
        require_zero_outside(model, opts[0], sparsifier)
    assert sum(int((p != 0).sum()) for p in matrices) == sparsifier.nnz == 40


@pytest.mark.parametrize("timing", ["instead", "after"])
@pytest.mark.parametrize("method", [rigl, set_])
def test_one_of_two_optimizers_may_skip_steps(timing: Any, method: Any):
    """As when a gradient scaler finds an overflow in one, or one steps every other iteration."""
    model = mlp()
    first, second = (torch.optim.SGD(model[i].parameters(), lr=0.05, momentum=0.9) for i in (0, 2))
    sparsifier = sparsify(model, [first, second], method(timing=timing))
    count = sparsifier.nnz
    for i in range(20):
        first.zero_grad()
        second.zero_grad()
        loss_of(model, data(i)).backward()
        if i not in (1, 2, 7):
            first.step()
        if i % 2 == 0:
            second.step()
        require_zero_outside(model[:2], first, _part(sparsifier, "0"))
        assert sum(int((model[j].weight != 0).sum()) for j in (0, 2)) <= count == sparsifier.nnz
    assert sparsifier.updates in (5, 6)


class _part:
    def __init__(self, sparsifier: Sparsifier, layer: str) -> None:
        self.topologies = {n: t for n, t in sparsifier.topologies.items() if n.startswith(layer)}


def test_a_replaced_step_keeps_the_gradients_of_an_optimizer_that_does_not_step():
    model = mlp()
    first, second = (torch.optim.SGD(model[i].parameters(), lr=0.05) for i in (0, 2))
    sparsify(model, [first, second], rigl(interval=1))
    loss_of(model, data(0)).backward()
    first.step()
    assert model[2].weight.grad is not None and model[2].weight.grad.any()


class Twice(torch.optim.SGD):
    """An optimizer whose step is another's and something more, as many outside torch are."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


def test_an_optimizer_that_calls_the_step_of_its_base_class_counts_once():
    model = mlp()
    torch.optim.SGD(model.parameters(), lr=0.1)
    opt = Twice(model.parameters(), lr=0.1)
    sparsifier = sparsify(model, opt, rigl(interval=3))
    for step in range(1, 6):
        train(model, opt, step)
    assert sparsifier.step == 5 and sparsifier.updates == 1


def test_someone_elses_wrapper_around_the_step_changes_nothing():
    def logged(method: Any) -> Any:
        def wrapper(self: Any, *args: Any) -> Any:
            return method(self, *args)

        return wrapper

    model, opt, sparsifier = start(rigl())
    for i in range(7):
        loss_of(model, data(i)).backward()
        logged(torch.optim.SGD.step)(opt)
    assert (sparsifier.step, sparsifier.updates) == (7, 2)


def test_two_rules_run_each_at_its_own_steps():
    ran: list[tuple[str, int]] = []
    rules = [every(n, (Rule(lambda w, step, n=n: ran.append((str(n), step))),), until=13) for n in (3, 4)]
    model, opt, _ = start(rigl()._replace(update=chain(*rules)))
    for i in range(14):
        train(model, opt, i)
    assert ran == [("3", 3), ("4", 4), ("3", 6), ("4", 8), ("3", 9), ("3", 12), ("4", 12)]


@pytest.mark.parametrize("method", ["rigl", "set", "snip"])
def test_schedulers_give_no_warning(method: str):
    for early in (False, True):
        model = mlp()
        opt = MAKE["sgd"](model.parameters())
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 10) if early else None
        sparsify(model, opt, METHODS[method]())
        scheduler = scheduler or torch.optim.lr_scheduler.CosineAnnealingLR(opt, 10)
        for step in range(1, 6):
            train(model, opt, step)
            scheduler.step()
        assert opt.param_groups[0]["lr"] == pytest.approx(0.05)
