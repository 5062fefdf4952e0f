"""What the sparsifier does to gradients between a backward and the step: clipping, accumulation, what is set aside."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from regrow import methods, sparsify
from regrow.core.method import Method
from support.loops import (
    MAKE,
    Branch,
    data,
    dense_gradients,
    loss_of,
    masks,
    require_zero_outside,
    rigl,
    same,
    start,
    train,
)
from support.table import METHODS


def test_clipping_sees_active_gradients_only():
    model, opt, sparsifier = start(rigl())
    expected = dense_gradients(model, data(1))
    for name, mask in masks(sparsifier).items():
        expected[name] *= mask
    loss_of(model, data(1)).backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1e9)
    torch.testing.assert_close(norm, torch.stack([g.norm() for g in expected.values()]).norm())
    opt.step()


@pytest.mark.parametrize("timing", ["instead", "after"])
def test_clipping_at_an_update_masks_on_request_and_growth_sees_all(timing: Any):
    """Property 26: clipping changes no choice, and inactive gradients take no part in the norm."""
    runs = []
    for clip in (False, True):
        model, opt, sparsifier = start(rigl(timing=timing))
        train(model, opt, 1), train(model, opt, 2)
        opt.zero_grad()
        expected = dense_gradients(model, data(3))
        loss_of(model, data(3)).backward()
        if clip:
            sparsifier.mask_gradients()
            for name, mask in masks(sparsifier).items():
                torch.testing.assert_close(model.get_parameter(name).grad, expected[name] * mask)
            nn.utils.clip_grad_norm_(model.parameters(), 1e9)
        opt.step()
        assert sparsifier.updates == 1
        runs.append((masks(sparsifier), dict(model.state_dict())))
    assert same(runs[0][0], runs[1][0])
    assert same(runs[0][1], runs[1][1])


@pytest.mark.parametrize("method", ["rigl", "rigl-after", "snfs", "set", "snip"])
def test_accumulation_equals_one_big_batch(method: str):
    """Property 44."""
    runs = []
    for parts in (1, 4):
        model, opt, sparsifier = start(METHODS[method]())
        for step in range(1, 10):
            opt.zero_grad()
            x, y = data(step)
            for a, b in zip(x.chunk(parts), y.chunk(parts), strict=True):
                (loss_of(model, (a, b)) / parts).backward()
            opt.step()
        runs.append(sparsifier.topologies)
    assert runs[0] == runs[1]


def test_a_backward_after_mask_gradients_is_refused():
    """Under DDP its gradient is not yet reduced where it arrives, so each rank would grow elsewhere."""
    model, _, sparsifier = start(rigl(interval=1))
    loss_of(model, data(1)).backward()
    sparsifier.mask_gradients()
    sparsifier.mask_gradients()
    with pytest.raises(RuntimeError, match=r"a backward came after mask_gradients\(\)"):
        loss_of(model, data(2)).backward()


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_what_is_set_aside_follows_the_clipping(name: str):
    """A newcomer's second moment and the running mean are of the gradients that the optimizer sees."""
    states = []
    for early in (False, True):
        model, opt, sparsifier = start(rigl(interval=3), name)
        for i in range(4):
            opt.zero_grad()
            (loss_of(model, data(i)) * 300).backward()
            if early:
                sparsifier.mask_gradients()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            elif i == 2:
                everywhere = {p: p.grad.clone() for p in model.parameters()}
                sparsifier.mask_gradients()
                norm = nn.utils.get_total_norm([p.grad for p in model.parameters()])
                for p, grad in everywhere.items():
                    p.grad = grad / (norm + 1e-6)
            else:
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            opt.step()
        states.append([s for p in model.parameters() for s in (p.detach(), *opt.state[p].values())])
    for a, b in zip(*states, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_step_given_up_after_mask_gradients_leaves_no_trace(set_to_none: bool):
    """A loop that masks, looks at the norm and starts over: the old gradient has no say in the growth."""
    runs = []
    for stumble in (False, True):
        model, opt, sparsifier = start(rigl(interval=1))
        if stumble:
            (loss_of(model, data(5)) * 100).backward()
            sparsifier.mask_gradients()
            opt.zero_grad(set_to_none=set_to_none)
        loss_of(model, data(1)).backward()
        opt.step()
        runs.append(sparsifier.topologies)
    assert runs[0] == runs[1]


def test_the_running_mean_is_of_clipped_gradients():
    """SNFS reads gradients at every step, so each is set aside before clipping and follows it."""
    model, opt, sparsifier = start(methods.snfs(0.5, until=30, interval=10, decay=0.5))
    expected = {name: torch.zeros(t.numel, dtype=torch.float64) for name, t in sparsifier.topologies.items()}
    for i in range(3):
        opt.zero_grad()
        (loss_of(model, data(i)) * 300).backward()
        everywhere = {name: model.get_parameter(name).grad.clone().view(-1) for name in expected}
        sparsifier.mask_gradients()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        for name, grad in everywhere.items():
            expected[name].lerp_(grad / (norm + 1e-6), 0.5)
    for weight in sparsifier.weights:
        torch.testing.assert_close(weight.state["momentum"], expected[weight.name])


@pytest.mark.parametrize("method", [rigl(), methods.static(0.5)])
def test_an_infinite_gradient_of_an_inactive_entry_is_zeroed(method: Method):
    """Property 9: infinity times zero is not zero, and must not become a weight outside the topology."""
    model, opt, sparsifier = start(method)
    name, mask = next(iter(masks(sparsifier).items()))
    weight = model.get_parameter(name)
    poison = torch.where(mask, 1.0, torch.inf).double()
    handle = weight.register_hook(lambda grad: torch.where(poison.isinf(), poison, grad))
    train(model, opt, 1)
    handle.remove()
    require_zero_outside(model, opt, sparsifier)
    assert weight.isfinite().all()


def test_gradients_written_through_data_revive_nothing():
    model, opt, sparsifier = start(rigl())
    for i in range(4):
        opt.zero_grad()
        loss_of(model, data(i)).backward()
        for p in model.parameters():
            p.grad.data.add_(1.0)
        opt.step()
        require_zero_outside(model, opt, sparsifier)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("method", ["rigl", "rigl-after", "set", "snfs", "snip", "gmp"])
def test_gradients_that_are_not_finite_stop_an_update_and_change_nothing(method: str, value: float):
    """Property 5."""
    model, opt, sparsifier = start(METHODS[method]())
    last = 0 if method == "snip" else 3
    for step in range(1, last + 1):
        train(model, opt, step)
    opt.zero_grad()
    loss_of(model, data(4)).backward()
    mask = masks(sparsifier)["2.weight"].nonzero()[:2]
    model[2].weight.grad[mask[:, 0], mask[:, 1]] = value
    before = copy.deepcopy([model.state_dict(), opt.state_dict(), masks(sparsifier), sparsifier.state_dict()["state"]])
    with pytest.raises(ValueError, match=r"2\.weight: 2 of 40 gradients are not finite"):
        opt.step()
    assert same(model.state_dict(), before[0]) and same(masks(sparsifier), before[2])
    assert (sparsifier.step, sparsifier.updates) == (last, 0)
    assert all(
        same({k: torch.as_tensor(v) for k, v in s.items()}, {k: torch.as_tensor(v) for k, v in old.items()})
        for s, old in zip(opt.state_dict()["state"].values(), before[1]["state"].values(), strict=True)
    )
    state = sparsifier.state_dict()["state"]
    assert state.keys() == before[3].keys() and all(same(state[n], before[3][n]) for n in state)
    train(model, opt, 4)
    assert sparsifier.step == last + 1 and sparsifier.started


@pytest.mark.parametrize("method", ["rigl", "rigl-after", "set", "snfs"])
def test_a_weight_without_gradient_is_left_as_it_is_and_logged(method: str, caplog: pytest.LogCaptureFixture):
    model = Branch().double()
    opt = MAKE["adam"](model.parameters())
    sparsifier = sparsify(model, opt, METHODS[method]())
    before, old = model.idle.weight.detach().clone(), masks(sparsifier)
    with caplog.at_level(logging.WARNING, logger="regrow"):
        for step in range(1, 5):
            train(model, opt, step)
    assert sparsifier.updates == 1
    assert torch.equal(model.idle.weight, before)
    assert torch.equal(masks(sparsifier)["idle.weight"], old["idle.weight"])
    assert not torch.equal(masks(sparsifier)["used.weight"], old["used.weight"])
    assert [r.getMessage() for r in caplog.records] == [
        "step 4: no gradient reached idle.weight: left as they are by the update"
    ]


def test_pruning_needs_no_gradient_and_says_nothing_false(caplog: pytest.LogCaptureFixture):
    model = Branch().double()
    opt = MAKE["adam"](model.parameters())
    sparsifier = sparsify(model, opt, METHODS["gmp"]())
    with caplog.at_level(logging.WARNING, logger="regrow"):
        for step in range(1, 5):
            train(model, opt, step)
    assert masks(sparsifier)["idle.weight"].all() or not caplog.records


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_branch_that_is_not_routed_is_left_alone(set_to_none: bool):
    model = nn.ModuleList([nn.Linear(6, 4), nn.Linear(6, 4)]).double()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = sparsify(model, opt, rigl(interval=2))
    before = sparsifier.topologies
    for i, branch in enumerate((1, 0)):
        opt.zero_grad(set_to_none=set_to_none)
        F.cross_entropy(model[branch](data(i)[0]), data(i)[1]).backward()
        opt.step()
    after = sparsifier.topologies
    assert after["0.weight"] != before["0.weight"] and after["1.weight"] == before["1.weight"]
