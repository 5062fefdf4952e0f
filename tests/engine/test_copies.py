"""Copies of an optimizer or a model, and what is freed when nobody holds it."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.optim import optimizer as torch_optimizer

from regrow import sparsify
from support.loops import (
    MAKE,
    data,
    hooks_of,
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
