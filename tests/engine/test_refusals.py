"""What cannot be done is refused in a sentence, and leaves model and optimizer as they were."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from regrow import methods, sparsify
from regrow.core.method import Method
from support.loops import (
    MAKE,
    data,
    hooks_of,
    loss_of,
    masks,
    mlp,
    rigl,
    same,
    start,
    train,
)
from support.table import DENSITY, METHODS, given


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


@pytest.mark.parametrize("density", [1e-9, 0.004])
def test_a_network_without_an_active_entry_is_refused(density: float):
    for method in (methods.static(density), methods.snip(density), methods.gmp(density, until=9, interval=3)):
        with pytest.raises(ValueError, match=r"makes none of the 100 sparsified ones active: the least .* is 0\.01"):
            start(method)


def test_a_weight_in_none_or_two_optimizers_is_an_error():
    model = mlp()
    first, both = (torch.optim.SGD(p, lr=0.1) for p in ([model[0].weight], model.parameters()))
    with pytest.raises(ValueError, match=r"2\.weight is in 0 of the 1"):
        sparsify(model, first, rigl())
    with pytest.raises(ValueError, match=r"0\.weight is in 2 of the 2"):
        sparsify(model, [first, both], rigl())
    sparsify(model, first, rigl(), skip="2")


def test_two_sparsifiers_on_one_optimizer_are_refused():
    model = mlp()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    first = sparsify(model, opt, rigl(), only="0")
    with pytest.raises(ValueError, match="the optimizer is already hooked by rigl"):
        sparsify(model, opt, rigl(), only="2")
    assert list(first.topologies) == ["0.weight"]


@pytest.mark.parametrize(("optimizer", "method"), [(None, rigl()), ("sgd", rigl()), (0, methods.rigl)])
def test_arguments_of_another_type_are_named(optimizer: Any, method: Any):
    model = mlp()
    given = torch.optim.SGD(model.parameters(), lr=0.1) if optimizer == 0 else optimizer
    with pytest.raises(TypeError, match="must be a"):
        sparsify(model, given, method)


def test_an_observer_that_is_missing_is_named():
    method = methods.snfs(0.5, until=9, interval=2)._replace(observe=None)
    model, opt, _ = start(method)
    train(model, opt, 0)
    with pytest.raises(ValueError, match=r"0\.weight has no running mean of gradients"):
        train(model, opt, 1)


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


def test_a_state_without_a_key_or_of_another_method_changes_nothing():
    for wrong in ({"step": None}, {"method": "static"}, {"topologies": {}}):
        _, _, sparsifier = start(rigl())
        before = masks(sparsifier)
        state = {**sparsifier.state_dict(), **wrong}
        state = {k: v for k, v in state.items() if v is not None}
        with pytest.raises(ValueError, match="sparsifier"):
            sparsifier.load_state_dict(state)
        assert same(masks(sparsifier), before)
