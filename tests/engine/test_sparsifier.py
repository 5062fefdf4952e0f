"""A sparsifier that nobody holds: its hooks keep it, and with it what it refuses and draws."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

import regrow
from regrow import methods
from regrow.core.method import Method
from support.loops import data, loss_of, mlp, rigl


def forgotten(model: nn.Module, method: Method) -> torch.optim.SGD:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    regrow.sparsify(model, optimizer, method)
    gc.collect()
    return optimizer


def test_it_keeps_refusing_a_second_one_and_other_optimizers() -> None:
    model = mlp()
    optimizer = forgotten(model, rigl())
    with pytest.raises(ValueError, match="is already sparsified by rigl"):
        regrow.sparsify(model, torch.optim.SGD(model.parameters(), lr=0.1), rigl())
    loss_of(model, data(1)).backward()
    with pytest.raises(RuntimeError, match="without regrow's hooks"):
        torch.optim.SGD(model.parameters(), lr=0.1).step()
    optimizer.step()


def test_it_keeps_drawing_noise() -> None:
    model = mlp()
    forgotten(model, methods.l0())
    x = data(1)[0]
    noisy = model(x)
    model.eval()
    assert not torch.equal(model(x), noisy)


def test_it_goes_with_its_optimizer() -> None:
    model = mlp()
    optimizer = forgotten(model, rigl())
    del optimizer
    gc.collect()
    regrow.sparsify(model, torch.optim.SGD(model.parameters(), lr=0.1), rigl())
