"""A sparsifier whose model is no longer its own says so, and states loaded in a wrong order lose no value."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable

import pytest
import torch
from torch import nn

from regrow import methods, sparsify
from regrow.storage.stored import Storage
from support.loops import data, loss_of, masks, mlp, rigl, same, start, train

STORAGES: list[Storage] = ["masked", "compressed"]


def assigned(model: nn.Module) -> None:
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)


def set_by_hand(model: nn.Module) -> None:
    model[2].weight = nn.Parameter(model[2].weight.detach().clone())  # type: ignore[index, union-attr]


def normed(model: nn.Module) -> None:
    nn.utils.parametrizations.weight_norm(model[0])  # type: ignore[index, arg-type]


REPLACED: dict[str, Callable[[nn.Module], None]] = {"assign": assigned, "by hand": set_by_hand, "weight norm": normed}


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("how", REPLACED)
@pytest.mark.parametrize("whose", ["own", "new"])
def test_a_parameter_that_was_replaced_is_an_error_at_the_next_step(how: str, storage: Storage, whose: str):
    model = mlp()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    if storage == "compressed" and how == "weight norm":
        pytest.skip("torch computes the norm of a matrix, which a compressed weight is not")
    sparsifier = sparsify(model, opt, rigl(), storage=storage)
    train(model, opt, 1)
    REPLACED[how](model)
    other = opt if whose == "own" else torch.optim.SGD(model.parameters(), lr=0.1)
    # A new optimizer of a normed model still holds the other weight, and is a stranger to that.
    message = r"is no longer the parameter that rigl sparsified|without regrow's hooks is stepping 1 sparsified"
    with pytest.raises(RuntimeError, match=message):
        train(model, other, 2)
    assert sparsifier.step == 1
    sparsifier.remove()
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), 3)


def test_an_optimizer_of_another_model_is_not_concerned():
    model, _, _ = start(rigl())
    assigned(model)
    other = mlp()
    opt = torch.optim.SGD(other.parameters(), lr=0.1)
    train(other, opt, 1)


def test_a_parameter_of_another_size_is_an_error():
    model, opt, _ = start(rigl())
    model[0].weight.data = torch.randn(10, 7, dtype=torch.float64)
    model[0].weight.grad = torch.randn(10, 7, dtype=torch.float64)
    with pytest.raises(
        RuntimeError, match=r"0\.weight was sparsified with shape \(10, 6\) and has shape \(10, 7\) now"
    ):
        opt.step()


def saved(storage: Storage = "masked") -> list[dict]:
    model = mlp()
    opt = torch.optim.Adam(model.parameters(), lr=0.01)
    sparsifier = sparsify(model, opt, rigl(interval=2), storage=storage)
    for step in range(1, 6):
        train(model, opt, step)
    return [copy.deepcopy(part.state_dict()) for part in (model, opt, sparsifier)]


def test_weights_that_were_loaded_before_sparsify_are_an_error():
    """The first topologies would have zeroed them; nothing is changed by the refusal."""
    weights, moments, state = saved()
    model = mlp()
    model.load_state_dict(weights)
    opt = torch.optim.Adam(model.parameters(), lr=0.01)
    sparsifier = sparsify(model, opt, rigl(interval=2), seed=7)
    opt.load_state_dict(moments)
    before = masks(sparsifier)
    with pytest.raises(ValueError, match=r"0\.weight holds \d+ of \d+ that are not zero, .* after regrow\.sparsify"):
        sparsifier.load_state_dict(state)
    assert same(masks(sparsifier), before) and sparsifier.step == 0
    model.load_state_dict(weights)
    sparsifier.load_state_dict(state)
    assert same(dict(model.state_dict()), weights) and sparsifier.step == 5


def test_a_forgotten_state_of_the_sparsifier_is_an_error():
    weights, moments, state = saved()
    model, opt, sparsifier = start(rigl(interval=2), "adam", seed=7)
    model.load_state_dict(weights)
    opt.load_state_dict(moments)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"sparse, and \d+ of their values lie .* sparsifier\.load_state_dict"):
            train(model, opt, 6)
        assert same(dict(model.state_dict()), weights) and sparsifier.step == 0
    sparsifier.load_state_dict(state)
    train(model, opt, 6)
    assert sparsifier.step == 6


def test_dense_weights_that_are_loaded_are_projected_with_a_word(caplog: pytest.LogCaptureFixture):
    """As a lottery ticket's are, which are those of a dense network in a topology that is known."""
    model, opt, sparsifier = start(methods.static(0.2))
    model.load_state_dict(mlp().state_dict())
    outside = sum(int((~m).sum()) for m in masks(sparsifier).values())
    with caplog.at_level(logging.WARNING, "regrow"):
        train(model, opt, 1)
        train(model, opt, 2)
    assert [r.getMessage() for r in caplog.records] == [
        f"{outside} values that were loaded lie outside the topologies and are zeroed"
    ]


def test_weights_of_its_own_are_loaded_without_a_word(caplog: pytest.LogCaptureFixture):
    model, opt, _ = start(rigl())
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    with caplog.at_level(logging.WARNING, "regrow"):
        loss_of(model, data(1)).backward()
        opt.step()
    assert not caplog.records
