"""The sparsifier beside every kind of training loop: what it must see, keep, refuse and leave alone."""

from __future__ import annotations

import copy
import gc
import io
import itertools
import logging
import math
import os
import pickle
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import optimizer as torch_optimizer

from regrow import Sparsifier, methods, sparsify
from regrow.core.method import Method, Need, Rule
from regrow.parts.allocation import uniform
from regrow.parts.schedules import constant
from regrow.parts.updates import chain, every
from regrow.storage import masked
from regrow.storage.state import ZERO_PRESERVING
from support.table import DENSITY, METHODS, given

FUSED = ["sgd-fused", "adam-fused"]
MAKE: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "sgd-fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "adam-fused": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
}


def mlp(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 4)).to(dtype)


def data(step: int, n: int = 8, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(step)
    return torch.randn(n, 6, generator=draw, dtype=torch.float64).to(dtype), torch.randint(0, 4, (n,), generator=draw)


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def train(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    optimizer.zero_grad()
    dtype = next(model.parameters()).dtype
    loss_of(model, data(step, dtype=dtype)).backward()
    optimizer.step()


def rigl(density: float = 0.5, interval: int = 3, until: int = 30, **options: Any) -> Method:
    return methods.rigl(density, interval=interval, until=until, anneal=constant, **options)


def set_(density: float = 0.5, interval: int = 3, until: int = 30, **options: Any) -> Method:
    return methods.set_(density, interval=interval, until=until, **options)


def start(method: Method, optimizer: str = "sgd", **options: Any) -> tuple[nn.Sequential, Any, Sparsifier]:
    model = mlp()
    opt = MAKE[optimizer](model.parameters())
    return model, opt, sparsify(model, opt, method, **options)


def masks(sparsifier: Sparsifier) -> dict[str, Tensor]:
    return {name: t.mask for name, t in sparsifier.topologies.items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


def require_zero_outside(model: nn.Module, optimizer: torch.optim.Optimizer, sparsifier: Sparsifier) -> None:
    for name, mask in masks(sparsifier).items():
        weight = model.get_parameter(name)
        state = {k: s for k, s in optimizer.state.get(weight, {}).items() if getattr(s, "shape", None) == weight.shape}
        for kind, tensor in {"value": weight.detach(), **state}.items():
            assert not tensor[~mask].any(), f"{kind} of {name} outside its topology"


def dense_gradients(model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    named = dict(model.named_parameters())
    return dict(zip(named, torch.autograd.grad(loss_of(model, batch), list(named.values())), strict=True))


# Clipping and accumulation


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


# Mixed precision


@pytest.mark.parametrize("optimizer", ["sgd", "adam", *FUSED])
@pytest.mark.parametrize("method", [rigl(), rigl(timing="after"), set_()])
@pytest.mark.parametrize("overflow_at", [2, 3, 4])
def test_an_overflow_neither_counts_nor_updates(method: Method, optimizer: str, overflow_at: int):
    model = mlp(torch.float32)
    opt = MAKE[optimizer](model.parameters())
    sparsifier = sparsify(model, opt, method)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for turn in range(1, 6):
        before = copy.deepcopy(model.state_dict()), masks(sparsifier), sparsifier.step
        overflow = turn == overflow_at
        opt.zero_grad()
        loss = loss_of(model, data(turn, dtype=torch.float32)) * (float("inf") if overflow else 1)
        scaler.scale(loss).backward()
        scaler.step(opt)
        scaler.update()
        if overflow:
            assert same(model.state_dict(), before[0]) and same(masks(sparsifier), before[1])
        assert sparsifier.step == before[2] + (not overflow)
        assert sparsifier.updates == (sparsifier.step >= 3)
        require_zero_outside(model, opt, sparsifier)


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("optimizer", ["sgd", *FUSED])
def test_an_overflow_at_an_update_with_masked_gradients_is_forgotten(optimizer: str, set_to_none: bool):
    model = mlp(torch.float32)
    opt = MAKE[optimizer](model.parameters())
    sparsifier = sparsify(model, opt, rigl(interval=1))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for factor in (float("inf"), 1.0):
        opt.zero_grad(set_to_none=set_to_none)
        scaler.scale(loss_of(model, data(1, dtype=torch.float32)) * factor).backward()
        scaler.unscale_(opt)
        sparsifier.mask_gradients()
        scaler.step(opt)
        scaler.update()
    assert sparsifier.updates == 1


@pytest.mark.parametrize("optimizer", ["sgd", "adam", *FUSED])
@pytest.mark.parametrize("method", ["snfs", "rigl", "rigl-after", "snip", "set"])
def test_a_loss_scale_changes_nothing(method: str, optimizer: str):
    """Property 26; SNFS's mean and the newcomers' second moments are those of unscaled gradients."""
    runs = []
    for scale in (None, 1.0, 1024.0):
        model = mlp(torch.float32)
        opt = MAKE[optimizer](model.parameters())
        sparsifier = sparsify(model, opt, METHODS[method]())
        scaler = torch.amp.GradScaler("cpu", enabled=scale is not None, init_scale=scale or 1.0)
        for step in range(1, 10):
            opt.zero_grad()
            scaler.scale(loss_of(model, data(step, dtype=torch.float32))).backward()
            scaler.step(opt)
            scaler.update()
        means = {w.name: w.state["momentum"] for w in sparsifier.weights if w.state}
        assert bool(means) == (method == "snfs")
        runs.append((masks(sparsifier), dict(model.state_dict()), means))
    for run in runs[1:]:
        assert same(run[0], runs[0][0])
        for kind in (1, 2):
            for name, value in runs[0][kind].items():
                torch.testing.assert_close(run[kind][name], value, rtol=1e-4, atol=1e-6)


# Closures


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


# Several optimizers


def two(make: Callable[[], Method]) -> tuple[nn.Sequential, list[torch.optim.Optimizer], Sparsifier]:
    model = mlp()
    adam = torch.optim.AdamW([model[0].bias, *model[2].parameters()], lr=0.01)
    opts = [torch.optim.SGD([model[0].weight], lr=0.1, momentum=0.9), adam]
    return model, opts, sparsify(model, opts, make())


def train_all(model: nn.Module, optimizers: list[torch.optim.Optimizer], step: int) -> None:
    model.zero_grad()
    loss_of(model, data(step)).backward()
    for optimizer in optimizers:
        optimizer.step()


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


def test_a_weight_in_none_or_two_optimizers_is_an_error():
    model = mlp()
    first, both = (torch.optim.SGD(p, lr=0.1) for p in ([model[0].weight], model.parameters()))
    with pytest.raises(ValueError, match=r"2\.weight is in 0 of the 1"):
        sparsify(model, first, rigl())
    with pytest.raises(ValueError, match=r"0\.weight is in 2 of the 2"):
        sparsify(model, [first, both], rigl())
    sparsify(model, first, rigl(), skip="2")


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


# Copies


def copies(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, torch.optim.Optimizer]:
    """Optimizers that hold the model's own parameters and none of its hooks."""
    memo = {id(p): p for p in model.parameters()}
    revived = pickle.loads(pickle.dumps(optimizer))
    for group, original in zip(revived.param_groups, optimizer.param_groups, strict=True):
        group["params"] = original["params"]
    fresh = torch.optim.SGD(model.parameters(), lr=0.1)
    return {"copy": copy.copy(optimizer), "deepcopy": copy.deepcopy(optimizer, memo), "pickle": revived, "new": fresh}


@pytest.mark.parametrize("kind", ["copy", "deepcopy", "pickle", "new"])
def test_a_step_of_a_copied_optimizer_is_an_error(kind: str):
    model, opt, sparsifier = start(rigl())
    train(model, opt, 1)
    other = copies(opt, model)[kind]
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r"without regrow's hooks.*2 sparsified weights"):
        train(model, other, 2)
    assert same(model.state_dict(), before)
    train(model, opt, 3)
    sparsifier.remove()
    train(model, other, 4)


def test_a_copied_optimizer_is_an_error_after_a_failed_closure_too():
    model, opt, _ = start(set_())

    def fails() -> Tensor:
        raise OSError("the data is gone")

    with pytest.raises(OSError, match="gone"):
        opt.step(fails)
    with pytest.raises(RuntimeError, match="without regrow's hooks"):
        train(model, copies(opt, model)["copy"], 1)


def saved_and_loaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m)), "save": saved_and_loaded}


@pytest.mark.parametrize("kind", COPIES)
def test_a_copied_model_is_a_plain_model(kind: str):
    """Property 14."""
    model, opt, sparsifier = start(rigl())
    train(model, opt, 1)
    other = COPIES[kind](model)
    assert same(other.state_dict(), model.state_dict())
    assert other(data(1)[0]).equal(model(data(1)[0]))
    before = copy.deepcopy(model.state_dict())
    own = torch.optim.SGD(other.parameters(), lr=0.1)
    other.zero_grad()
    loss_of(other, data(2)).backward()
    assert all((other.get_parameter(n).grad[~m] != 0).any() for n, m in masks(sparsifier).items())
    own.step()
    assert same(model.state_dict(), before)
    train(model, opt, 2)
    require_zero_outside(model, opt, sparsifier)


def test_a_model_that_is_let_go_is_freed():
    """Nothing outside the model holds on to it, and a later run is not slowed down by those before it."""
    hooks = len(torch_optimizer._global_optimizer_pre_hooks)
    model, opt, sparsifier = start(rigl())
    train(model, opt, 1)
    gone = weakref.ref(model), weakref.ref(opt), weakref.ref(sparsifier)
    del model, opt, sparsifier
    gc.collect()
    assert [ref() is None for ref in gone] == [True, True, True]
    assert len(torch_optimizer._global_optimizer_pre_hooks) <= hooks


def test_a_sparsifier_may_be_freed_in_the_middle_of_a_step():
    """Garbage collection comes whenever it likes, also while an optimizer runs through its hooks."""
    collect = torch_optimizer.register_optimizer_step_pre_hook(lambda *_: gc.collect() and None)
    gc.disable()
    try:
        start(rigl())
        model, opt, sparsifier = start(rigl())
        train(model, opt, 1)
    finally:
        gc.enable()
        collect.remove()
    assert sparsifier.step == 1


def test_the_sparsifier_works_without_being_kept():
    model = mlp()
    opt = MAKE["sgd"](model.parameters())
    sparsify(model, opt, rigl())
    gc.collect()
    for step in range(1, 8):
        train(model, opt, step)
    assert sum(int((p != 0).sum()) for p in model.parameters() if p.dim() == 2) <= 50


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


# Optimizer state


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
    sparsifier = sparsify(model, opt, rigl(0.3, interval=interval, until=6 * interval))
    newcomers, longest = torch.zeros(16, 12, dtype=torch.bool), 0.0
    for _ in range(8 * interval):
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


class Noisy(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.add_(torch.randn_like(parameter), alpha=0.01)


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


# What others do to the model


def dense_values(model: nn.Module) -> dict[str, Tensor]:
    return {n: torch.randn_like(p) for n, p in model.state_dict().items()}


def by_vector(model: nn.Module, values: dict[str, Tensor]) -> None:
    nn.utils.vector_to_parameters(torch.cat([v.view(-1) for v in values.values()]), model.parameters())


def by_data(model: nn.Module, values: dict[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        parameter.data.copy_(values[name])


def by_new_data(model: nn.Module, values: dict[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        parameter.data = values[name].clone()


def by_no_grad(model: nn.Module, values: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(values[name])


WRITERS: dict[str, Callable[[nn.Module, dict[str, Tensor]], Any]] = {
    "load_state_dict": lambda model, values: model.load_state_dict(values),
    "no_grad": by_no_grad,
    "data": by_data,
    "new data": by_new_data,
    "vector_to_parameters": by_vector,
}


@pytest.mark.parametrize("writer", WRITERS)
def test_weights_written_from_outside_are_projected_at_the_next_step(writer: str):
    """Property 9."""
    model, opt, sparsifier = start(methods.static(0.5))
    train(model, opt, 1)
    values = dense_values(model)
    WRITERS[writer](model, values)
    train(model, opt, 2)
    require_zero_outside(model, opt, sparsifier)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("after", [0, 4])
def test_the_model_may_change_its_dtype(dtype: torch.dtype, after: int):
    """Property 14."""
    model, opt, sparsifier = start(rigl())
    for step in range(1, after + 1):
        train(model, opt, step)
    model.to(dtype)
    opt.state.clear()
    for step in range(after + 1, 12):
        train(model, opt, step)
        require_zero_outside(model, opt, sparsifier)
    assert sparsifier.updates == 3
    assert sum(int(m.sum()) for m in masks(sparsifier).values()) == 50


@pytest.mark.parametrize("when", ["before", "after"])
def test_channels_last(when: str):
    """Property 14: the memory format changes no topology."""
    runs = []
    for last in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.Flatten()).double()
        if last and when == "before":
            model.to(memory_format=torch.channels_last)
        opt = torch.optim.AdamW(model.parameters(), lr=0.01)
        sparsifier = sparsify(model, opt, rigl(0.3, interval=2))
        if last and when == "after":
            model.to(memory_format=torch.channels_last)
        for step in range(1, 8):
            x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(step)).double()
            model.zero_grad()
            model(x.to(memory_format=torch.channels_last) if last else x).square().mean().backward()
            opt.step()
            require_zero_outside(model, opt, sparsifier)
        runs.append(sparsifier.topologies)
        assert sparsifier.updates == 3
    assert runs[0] == runs[1]


def test_tied_weights_are_masked_once_and_stay_tied():
    """Property 14."""
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Linear(6, 4)).double()
    model[2].weight = model[0].weight
    opt = MAKE["adam"](model.parameters())
    sparsifier = sparsify(model, opt, rigl(0.4))
    assert list(sparsifier.topologies) == ["0.weight", "3.weight"]
    assert sparsifier.numel == 60
    for step in range(1, 11):
        train(model, opt, step)
        require_zero_outside(model, opt, sparsifier)
    assert model[2].weight is model[0].weight
    assert sum(int((w.weight != 0).sum()) for w in (model[0], model[3])) == 24


class Language(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 9, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.body(self.embed(tokens)))


def test_a_head_tied_to_an_embedding_is_left_out():
    """Property 13."""
    model = Language()
    opt = MAKE["adam"](model.parameters())
    sparsifier = sparsify(model, opt, rigl(0.5, interval=1))
    for _ in range(3):
        opt.zero_grad()
        model(torch.arange(9)).square().mean().backward()
        opt.step()
    assert list(sparsifier.topologies) == ["body.weight"]
    assert (model.head.weight != 0).all() and model.head.weight is model.embed.weight
    assert "shared with embed.weight" in repr(sparsifier)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", ["aot_eager"])
def test_a_compiled_model_gets_the_same_topologies(backend: str):
    """Property 14."""
    if not torch.compiler.list_backends():
        pytest.skip("torch.compile is not supported here")
    runs = []
    for compiled in (False, True):
        model = mlp()
        opt = MAKE["sgd"](model.parameters())
        net = torch.compile(model, backend=backend) if compiled else model
        sparsifier = sparsify(net, opt, rigl(interval=2))
        for step in range(1, 6):
            opt.zero_grad()
            try:
                loss = loss_of(net, data(step))
            except Exception as error:
                if backend == "inductor" and "compiler" in str(error).lower():
                    pytest.skip("no C++ compiler")
                raise
            loss.backward()
            opt.step()
            require_zero_outside(model, opt, sparsifier)
        runs.append(sparsifier.topologies)
    assert runs[0] == runs[1]


# Several processes


RANKED: dict[str, tuple[Callable[[], Method], bool]] = {
    "rigl": (lambda: rigl(interval=2), False),
    "rigl-after": (lambda: rigl(interval=2, timing="after"), False),
    "set": (lambda: set_(interval=2), False),
    "snfs": (METHODS["snfs"], False),
    "snip": (lambda: methods.snip(0.5), False),
    "closure": (lambda: rigl(interval=2, timing="after"), True),
}


def history(name: str, wrap: Callable[[nn.Module], nn.Module], part: Callable[[Tensor], Tensor]) -> list[Any]:
    """Topologies after each of 6 steps, as lists of positions."""
    make, with_closure = RANKED[name]
    net = wrap(mlp())
    opt = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    sparsifier, log = sparsify(net, opt, make()), []
    for step in range(1, 7):
        batch = tuple(part(t) for t in data(step))

        def closure(batch: Any = batch) -> Tensor:
            opt.zero_grad()
            loss = loss_of(net, batch)
            loss.backward()
            return loss.detach()

        if with_closure:
            opt.step(closure)
        else:
            closure()
            opt.step()
        log.append({n: t.indices.tolist() for n, t in sparsifier.topologies.items()})
    return log


def rank_main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    file = f"file://{folder / 'meet'}"
    torch.distributed.init_process_group("gloo", init_method=file, rank=rank, world_size=2)
    wrap = nn.parallel.DistributedDataParallel
    logs = {name: history(name, wrap, lambda t: t.chunk(2)[rank]) for name in RANKED}
    torch.save(logs, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("this torch has no gloo")
    folder = tmp_path_factory.mktemp("ranks")
    path = os.pathsep.join([str(Path(masked.__file__).parents[2]), str(Path(__file__).parents[1])])
    options: dict[str, Any] = {"env": {**os.environ, "PYTHONPATH": path}, "stderr": subprocess.PIPE, "text": True}
    runs = [subprocess.Popen([sys.executable, __file__, str(rank), str(folder)], **options) for rank in range(2)]
    for run in runs:
        _, errors = run.communicate(timeout=120)
        assert run.returncode == 0, errors
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", RANKED)
def test_two_ranks_have_the_topologies_of_one_process(name: str, ranks: list[dict[str, Any]]):
    """Property 43: with different data on each rank."""
    assert ranks[0][name] == ranks[1][name]
    assert ranks[0][name] == history(name, lambda model: model, lambda t: t)
    assert any(now != ranks[0][name][0] for now in ranks[0][name]) or name == "snip"


# What cannot be done


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


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


def hooks_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[int]:
    own = [len(p._post_accumulate_grad_hooks or ()) for p in model.parameters()]
    steps = [len(optimizer._optimizer_step_pre_hooks), len(optimizer._optimizer_step_post_hooks)]
    return [*own, *steps, len(torch_optimizer._global_optimizer_pre_hooks)]


def broken_loss(model: nn.Module, batch: Any) -> Tensor:
    raise OSError("no such batch")


def infinite_loss(model: nn.Module, batch: Any) -> Tensor:
    return loss_of(model, batch) * float("inf")


ERRORS: dict[str, tuple[Method, dict[str, Any]]] = {
    "storage": (rigl(), {"storage": "mask"}),
    "budget": (rigl(), {"budget": "all"}),
    "skip": (rigl(), {"skip": "no such layer"}),
    "nothing": (rigl(), {"skip": nn.Linear}),
    "infeasible": (rigl(0.1), {"budget": "model", "skip": "0"}),
    "batches alone": (methods.snip(0.5), {"batches": [data(1)]}),
    "loss alone": (methods.snip(0.5), {"loss": loss_of}),
    "batches unused": (rigl(), {"batches": [data(1)], "loss": loss_of}),
    "no batches": (methods.snip(0.5), {"batches": [], "loss": loss_of}),
    "broken loss": (methods.snip(0.5), {"batches": [data(1)], "loss": broken_loss}),
    "infinite loss": (methods.snip(0.5), {"batches": [data(1)], "loss": infinite_loss}),
}


@pytest.mark.parametrize("error", ERRORS)
def test_an_error_leaves_model_and_optimizer_as_they_were(error: str):
    """Property 48."""
    gc.collect()
    model = mlp()
    opt = MAKE["sgd"](model.parameters())
    before, hooks = copy.deepcopy(model.state_dict()), hooks_of(model, opt)
    method, options = ERRORS[error]
    with pytest.raises((ValueError, OSError)):
        sparsify(model, opt, method, **options)
    assert same(model.state_dict(), before)
    assert hooks_of(model, opt) == hooks
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("kind", ["infinite", "nan"])
def test_a_start_from_batches_refuses_gradients_that_are_not_finite(kind: str):
    """Property 5: infinite scores are rejected, not selected."""
    model = mlp()
    poison = torch.zeros(10, 6, dtype=torch.float64)
    poison[:, 0] = {"infinite": torch.inf, "nan": torch.nan}[kind]
    model[0].weight.register_hook(lambda grad: grad + poison)
    with pytest.raises(ValueError, match="10 of 60"):
        sparsify(model, MAKE["sgd"](model.parameters()), methods.snip(0.5), batches=[data(1)], loss=loss_of)


@pytest.mark.parametrize("method", [m for m, row in METHODS.items() if row.density == DENSITY])
def test_an_infeasible_budget_is_an_error_at_once(method: str):
    """Property 16: not at a pruning hours later."""
    model = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 2))
    with pytest.raises(ValueError, match="least feasible density"):
        recipe = METHODS[method]()
        more = given(recipe, [data(0)])
        sparsify(model, MAKE["sgd"](model.parameters()), recipe, skip="0", budget="model", **more)


def test_remove_gives_the_plain_model_back():
    gc.collect()
    model = mlp()
    opt = MAKE["sgd"](model.parameters())
    hooks = hooks_of(model, opt)
    sparsifier = sparsify(model, opt, rigl())
    assert hooks_of(model, opt) != hooks
    train(model, opt, 1)
    before = copy.deepcopy(model.state_dict())
    sparsifier.remove()
    sparsifier.remove()
    assert same(model.state_dict(), before)
    assert hooks_of(model, opt) == hooks
    train(model, opt, 2)
    assert sum(int((p != 0).sum()) for p in model.parameters() if p.dim() == 2) > 50


def test_the_state_of_another_model_is_refused():
    _, _, sparsifier = start(rigl())
    before = masks(sparsifier)
    state = sparsifier.state_dict()
    other = nn.Sequential(nn.Linear(6, 10), nn.Linear(10, 4), nn.Linear(4, 4)).double()
    larger = sparsify(other, MAKE["sgd"](other.parameters()), rigl(0.5)).state_dict()
    for wrong in ({**state, "version": 2}, larger):
        with pytest.raises(ValueError, match="state"):
            sparsifier.load_state_dict(wrong)
    assert same(masks(sparsifier), before)


@pytest.mark.parametrize("case", ["fewer weights", "another shape"])
def test_a_state_that_does_not_fit_is_refused_and_nothing_becomes_dense(case: str):
    """Property 48: a weight that the state does not know must not silently become dense."""
    layers = [nn.Linear(10, 6), nn.Tanh(), nn.Linear(4, 10)]
    other = nn.Sequential(*(layers if case == "another shape" else [nn.Linear(6, 10)]))
    wrong = sparsify(other, MAKE["sgd"](other.parameters()), rigl()).state_dict()
    _, _, sparsifier = start(rigl())
    before = masks(sparsifier)
    with pytest.raises(ValueError, match="state"):
        sparsifier.load_state_dict(wrong)
    assert same(masks(sparsifier), before)


# What is shown and watched


def test_the_table_shows_every_layer():
    model, opt, sparsifier = start(rigl()._replace(needs=Need.GRADIENT | Need.EXPLORED), skip="2")
    train(model, opt, 1)
    lines = repr(sparsifier).splitlines()
    assert lines[0] == "rigl: 50.0000% of 60 entries active, step 1, 0 updates"
    assert lines[1].split() == ["layer", "shape", "density", "active", "storage", "explored"]
    assert lines[2].split() == ["0.weight", "10", "x", "6", "0.5000", "30", "masked", "0.500"]
    assert lines[3].split() == ["2.weight", "4", "x", "10", "1", "40", "skipped"]
    assert (sparsifier.nnz, sparsifier.numel, sparsifier.density, sparsifier.explored) == (30, 60, 0.5, 0.5)


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


# A start that needs a gradient


def expected_snip(model: nn.Module, batches: list[tuple[Tensor, Tensor]], count: int) -> dict[str, Tensor]:
    """The `count` largest |w mean(g)| over both weights."""
    weights = {n: p for n, p in model.named_parameters() if p.dim() == 2}
    mean = {n: sum(dense_gradients(model, b)[n] for b in batches) / len(batches) for n in weights}
    score = {n: (weights[n].detach() * mean[n]).abs() for n in weights}
    threshold = torch.cat([s.view(-1) for s in score.values()]).sort(descending=True).values[count - 1]
    return {n: s >= threshold for n, s in score.items()}


def test_snip_takes_the_place_of_the_first_step():
    """Property 30."""
    model, opt, sparsifier = start(methods.snip(0.3), "adam")
    before = copy.deepcopy(model.state_dict())
    expected = expected_snip(model, [data(1)], 30)
    train(model, opt, 1)
    assert same(masks(sparsifier), expected)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name] * expected.get(name, torch.tensor(1)))
    assert not opt.state
    assert (sparsifier.step, sparsifier.updates, sparsifier.started) == (1, 0, True)
    train(model, opt, 2)
    require_zero_outside(model, opt, sparsifier)


def normed() -> nn.Sequential:
    torch.manual_seed(3)
    layers = [nn.Linear(6, 10), nn.BatchNorm1d(10), nn.Dropout(0.2), nn.Linear(10, 4)]
    return nn.Sequential(*layers).double()


def test_snip_from_batches_leaves_no_trace_but_zeros():
    """Property 30: weights, buffers, gradients, requires_grad, mode and the random state are as before."""
    model = normed()
    opt = MAKE["sgd"](model.parameters())
    loss_of(model, data(9)).backward()
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    grads = [p.grad.clone() for p in model.parameters()]
    sparsifier = sparsify(model, opt, methods.snip(0.3), batches=(data(i) for i in (1, 2, 3)), loss=loss_of)
    assert sparsifier.started and sparsifier.step == 0 and sparsifier.nnz == 30
    assert torch.equal(torch.get_rng_state(), random)
    found = masks(sparsifier)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name] * found.get(name, torch.tensor(1)).to(value.dtype))
    assert all(p.requires_grad for p in model.parameters()) and model.training
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
    assert not opt.state


def test_snip_ranks_the_mean_gradient_of_its_batches_in_any_order():
    """Property 30."""
    batches = [data(i) for i in (1, 2, 3)]
    expected = expected_snip(mlp(), batches, 30)
    for order in itertools.permutations(batches):
        _, _, sparsifier = start(methods.snip(0.3), batches=order, loss=loss_of)
        assert same(masks(sparsifier), expected)


def test_snip_layer_by_layer():
    """Property 30."""
    model, opt, sparsifier = start(methods.snip(0.3, allocate=uniform))
    train(model, opt, 1)
    assert {n: int(m.sum()) for n, m in masks(sparsifier).items()} == {"0.weight": 18, "2.weight": 12}


if __name__ == "__main__":
    rank_main(int(sys.argv[1]), Path(sys.argv[2]))


# Situations found in review


@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.Adagrad, torch.optim.RMSprop])
def test_an_eps_of_zero_leaves_inactive_entries_at_zero(make: Any):
    model = mlp()
    opt = make(model.parameters(), lr=1e-3, eps=0)
    sparsifier = sparsify(model, opt, rigl())
    for i in range(8):
        train(model, opt, i)
        require_zero_outside(model, opt, sparsifier)
    assert all(p.isfinite().all() for p in model.parameters())


def test_gradients_written_through_data_revive_nothing():
    model, opt, sparsifier = start(rigl())
    for i in range(4):
        opt.zero_grad()
        loss_of(model, data(i)).backward()
        for p in model.parameters():
            p.grad.data.add_(1.0)
        opt.step()
        require_zero_outside(model, opt, sparsifier)


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


def test_two_sparsifiers_on_one_optimizer_are_refused():
    model = mlp()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    first = sparsify(model, opt, rigl(), only="0")
    with pytest.raises(ValueError, match="the optimizer is already hooked by rigl"):
        sparsify(model, opt, rigl(), only="2")
    assert list(first.topologies) == ["0.weight"]


def test_two_rules_run_each_at_its_own_steps():
    ran: list[tuple[str, int]] = []
    rules = [every(n, (Rule(lambda w, step, n=n: ran.append((str(n), step))),), until=13) for n in (3, 4)]
    model, opt, _ = start(rigl()._replace(update=chain(*rules)))
    for i in range(14):
        train(model, opt, i)
    assert ran == [("3", 3), ("4", 4), ("3", 6), ("4", 8), ("3", 9), ("3", 12), ("4", 12)]


@pytest.mark.parametrize("density", [1e-9, 0.004])
def test_a_network_without_an_active_entry_is_refused(density: float):
    for method in (methods.static(density), methods.snip(density), methods.gmp(density, until=9, interval=3)):
        with pytest.raises(ValueError, match=r"makes none of the 100 sparsified ones active: the least .* is 0\.01"):
            start(method)


def test_a_state_without_a_key_or_of_another_method_changes_nothing():
    for wrong in ({"step": None}, {"method": "static"}, {"topologies": {}}):
        _, _, sparsifier = start(rigl())
        before = masks(sparsifier)
        state = {**sparsifier.state_dict(), **wrong}
        state = {k: v for k, v in state.items() if v is not None}
        with pytest.raises(ValueError, match="sparsifier"):
            sparsifier.load_state_dict(state)
        assert same(masks(sparsifier), before)


@pytest.mark.parametrize(("optimizer", "method"), [(None, rigl()), ("sgd", rigl()), (0, methods.rigl)])
def test_arguments_of_another_type_are_named(optimizer: Any, method: Any):
    model = mlp()
    given = torch.optim.SGD(model.parameters(), lr=0.1) if optimizer == 0 else optimizer
    with pytest.raises(TypeError, match="must be a"):
        sparsify(model, given, method)


def test_a_buffer_that_the_model_replaces_is_restored():
    class Counting(nn.Linear):
        def __init__(self) -> None:
            super().__init__(6, 4)
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.seen = self.seen + 1
            return super().forward(x)

    model = Counting().double()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsify(model, opt, methods.snip(0.5), batches=[data(0), data(1)], loss=loss_of)
    assert model.seen == 0


def test_an_observer_that_is_missing_is_named():
    method = methods.snfs(0.5, until=9, interval=2)._replace(observe=None)
    model, opt, _ = start(method)
    train(model, opt, 0)
    with pytest.raises(ValueError, match=r"0\.weight has no running mean of gradients"):
        train(model, opt, 1)


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


def test_optimizer_state_of_a_dense_run_is_projected_at_the_next_step():
    model, opt, sparsifier = start(rigl())
    dense = mlp()
    other = MAKE["sgd"](dense.parameters())
    train(dense, other, 0)
    train(model, opt, 0)
    opt.load_state_dict(other.state_dict())
    train(model, opt, 1)
    require_zero_outside(model, opt, sparsifier)
