"""Methods go to other processes; what works by hooks says that it does not."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch

from regrow import methods, sparsify
from regrow.parts import groups
from support.loops import masks, mlp, same, start, train


@pytest.mark.parametrize("name", methods.BY_NAME)
def test_a_method_that_a_recipe_made_is_pickled_as_its_call(name: str):
    recipe = methods.BY_NAME[name]
    known = inspect.signature(recipe).parameters
    method = recipe(
        **{
            option: value
            for option, value in {"density": 0.2, "until": 10_000, "backward_density": 0.4}.items()
            if option in known
        }
    )
    twin = pickle.loads(pickle.dumps(method))
    assert twin._replace(made=None).name == method.name
    assert twin.made[:3] == method.made[:3]
    again = pickle.loads(pickle.dumps(twin))
    assert again.made[:3] == method.made[:3]


def test_a_pickled_method_makes_the_same_run():
    runs = []
    method = methods.rigl(0.2, until=20, interval=2, structure=groups(2))
    for made in (method, pickle.loads(pickle.dumps(method)), copy.deepcopy(method)):
        model, opt, sparsifier = start(made, seed=3)
        for step in range(1, 6):
            train(model, opt, step)
        runs.append(masks(sparsifier))
    assert same(runs[0], runs[1]) and same(runs[0], runs[2])


def test_a_method_that_was_changed_is_not_pickled_as_it_was():
    method = methods.static(0.2)._replace(name="mine")
    with pytest.raises((pickle.PicklingError, AttributeError), match="local object"):
        pickle.dumps(method)


def test_a_sparsifier_is_not_copied():
    model = mlp()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = sparsify(model, opt, methods.static(0.2))
    for copied in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=r"works through hooks .* state_dict\(\)"):
            copied(sparsifier)
    with pytest.raises(TypeError, match="works through hooks"):
        copy.deepcopy((model, opt, sparsifier))
