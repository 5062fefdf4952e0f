"""Optimizer state: that of survivors and newcomers, and zeros outside whatever the optimizer does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from regrow import methods, sparsify
from regrow.core.method import Method
from regrow.storage import masked
from regrow.storage.state import ZERO_PRESERVING
from support.loops import (
    MAKE,
    Noisy,
    masks,
    mlp,
    require_zero_outside,
    rigl,
    set_,
    start,
    train,
)

ADAPTIVE: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-3),
    "AMSGrad": lambda p: torch.optim.Adam(p, lr=1e-3, amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.0),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=1e-3),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=1e-3),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-3),
}


def longest_newcomer_step(make: Callable[[Any], torch.optim.Optimizer], interval: int) -> float:
    """In learning rates, over all steps that any newcomer makes under a constant gradient."""
    model = nn.Linear(12, 16, bias=False, dtype=torch.float64)
    gradient = torch.rand(16, 12, dtype=torch.float64) ** 3 * torch.randn(16, 12).sign() + 1e-3
    opt = make(model.parameters())
    sparsifier = sparsify(model, opt, rigl(0.3, interval=interval, until=4 * interval))
    newcomers, longest = torch.zeros(16, 12, dtype=torch.bool), 0.0
    for _ in range(5 * interval):
        opt.zero_grad()
        (model.weight * gradient).sum().backward()
        before, mask = model.weight.detach().clone(), masks(sparsifier)["weight"]
        opt.step()
        after = masks(sparsifier)["weight"]
        moved = (model.weight.detach() - before).abs()[newcomers & mask & after]
        longest = max(longest, float(moved.max()) if moved.numel() else 0.0)
        newcomers |= after & ~mask
    assert newcomers.sum() >= 10
    return longest / 1e-3


@pytest.mark.parametrize("interval", [10, 60])
@pytest.mark.parametrize("optimizer", ADAPTIVE)
def test_newcomers_never_step_further_than_the_learning_rate(optimizer: str, interval: int):
    """Property 12."""
    longest = longest_newcomer_step(ADAPTIVE[optimizer], interval)
    assert 0 < longest <= 1.01


@pytest.mark.parametrize("optimizer", ["Adam", "AMSGrad", "AdamW", "NAdam", "RMSprop"])
def test_zeroed_second_moments_would_send_newcomers_too_far(optimizer: str, monkeypatch: pytest.MonkeyPatch):
    """Property 12: what the exception for second moments is there for."""
    monkeypatch.setattr(masked, "SECOND_MOMENTS", frozenset())
    assert longest_newcomer_step(ADAPTIVE[optimizer], 60) > 1.5


def test_survivors_keep_value_and_state_and_newcomers_start_without_momentum():
    """Properties 10 and 11."""
    model, opt, sparsifier = start(rigl(), "adam")
    train(model, opt, 1), train(model, opt, 2)
    weight = model[0].weight
    old, value = masks(sparsifier)["0.weight"], weight.detach().clone()
    state = {k: s.clone() for k, s in opt.state[weight].items()}
    train(model, opt, 3)
    new = masks(sparsifier)["0.weight"]
    assert (old & new).any() and (new & ~old).any()
    assert torch.equal(weight[old & new], value[old & new])
    assert not weight[new & ~old].any()
    for key in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(opt.state[weight][key][old & new], state[key][old & new])
    assert not opt.state[weight]["exp_avg"][new & ~old].any()
    assert (opt.state[weight]["exp_avg_sq"][new & ~old] > 0).all()


PRESERVING: dict[str, list[dict[str, Any]]] = {
    "SGD": [{"momentum": 0.9, "dampening": 0.1}, {"momentum": 0.9, "nesterov": True, "maximize": True}],
    "Adam": [{}, {"amsgrad": True}, {"fused": True}, {"foreach": True}],
    "AdamW": [{}, {"amsgrad": True}, {"fused": True}, {"foreach": True}],
    "NAdam": [{}, {"decoupled_weight_decay": True}, {"foreach": True}],
    "RAdam": [{}, {"decoupled_weight_decay": True}, {"foreach": True}],
    "Adagrad": [{}, {"initial_accumulator_value": 0.1}, {"fused": True}, {"foreach": True}],
    "Adadelta": [{}, {"foreach": True}],
    "RMSprop": [{"momentum": 0.9, "centered": True}, {"foreach": True}],
}


def test_every_zero_preserving_optimizer_is_in_the_table():
    assert set(PRESERVING) == ZERO_PRESERVING


@pytest.mark.parametrize(("name", "options"), [(n, o) for n, all_ in PRESERVING.items() for o in all_], ids=str)
def test_zero_preserving_optimizers_preserve_zeros(name: str, options: dict[str, Any]):
    """Properties 9 and 11: with a topology that never changes nothing but the optimizer writes."""
    model = mlp()
    opt = getattr(torch.optim, name)(model.parameters(), lr=0.01, weight_decay=0.1, **options)
    sparsifier = sparsify(model, opt, methods.static(0.3))
    for step in range(1, 51):
        train(model, opt, step)
        require_zero_outside(model, opt, sparsifier)
    assert any(s.shape == model[0].weight.shape for s in opt.state[model[0].weight].values() if torch.is_tensor(s))


OTHERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "noisy": lambda p: Noisy(p, lr=0.1),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.1),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
}


@pytest.mark.parametrize("method", [methods.static(0.3), rigl(0.3), set_(0.3)])
@pytest.mark.parametrize("optimizer", OTHERS)
def test_other_optimizers_are_projected(optimizer: str, method: Method):
    """Property 9: zero outside, whatever the optimizer did."""
    model = mlp()
    opt = OTHERS[optimizer](model.parameters())
    sparsifier = sparsify(model, opt, method)
    for step in range(1, 21):
        train(model, opt, step)
        require_zero_outside(model, opt, sparsifier)
    assert sum(int((p != 0).sum()) for p in model.parameters() if p.dim() == 2) <= 30


@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.Adagrad, torch.optim.RMSprop])
def test_an_eps_of_zero_leaves_inactive_entries_at_zero(make: Any):
    model = mlp()
    opt = make(model.parameters(), lr=1e-3, eps=0)
    sparsifier = sparsify(model, opt, rigl())
    for i in range(8):
        train(model, opt, i)
        require_zero_outside(model, opt, sparsifier)
    assert all(p.isfinite().all() for p in model.parameters())


def test_optimizer_state_of_a_dense_run_is_projected_at_the_next_step():
    model, opt, sparsifier = start(rigl())
    dense = mlp()
    other = MAKE["sgd"](dense.parameters())
    train(dense, other, 0)
    train(model, opt, 0)
    opt.load_state_dict(other.state_dict())
    train(model, opt, 1)
    require_zero_outside(model, opt, sparsifier)
