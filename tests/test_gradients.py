"""The mean gradient over batches: what it is, what it leaves behind, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import regrow
from regrow import methods
from regrow.gradients import mean_gradient
from regrow.storages import Storage

Batch = tuple[Tensor, Tensor]


def squares(model: nn.Module, batch: Batch) -> Tensor:
    x, y = batch
    return (model(x) - y).square().mean()


def batches(count: int) -> list[Batch]:
    return [(torch.randn(4, 6), torch.randn(4, 3)) for _ in range(count)]


def test_the_mean_is_that_of_single_gradients_and_leaves_no_trace() -> None:
    model, data = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout(), nn.Linear(5, 3)), batches(3)
    model[0].weight.grad = torch.ones(5, 6)
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    seed = torch.random.get_rng_state()
    with mean_gradient(model, [model[0].weight], data, squares):
        found = model[0].weight.grad
        assert model[1].num_batches_tracked == 3
    assert (model[0].weight.grad == 1).all() and model[3].weight.grad is None
    assert torch.equal(seed, torch.random.get_rng_state())
    assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())
    expected = sum(torch.autograd.grad(squares(model, batch), model[0].weight)[0] for batch in data) / 3
    assert torch.allclose(found, expected)


def test_no_batch_is_an_error() -> None:
    model = nn.Linear(6, 3)
    with pytest.raises(ValueError, match="batches= is empty"), mean_gradient(model, [model.weight], [], squares):
        pass


@pytest.mark.parametrize("storage", ["masked", "compressed"])
def test_batches_start_snip_the_same_in_either_storage(storage: Storage) -> None:
    model, data = nn.Linear(6, 3), batches(2)
    expected = sum(torch.autograd.grad(squares(model, batch), model.weight)[0] for batch in data)
    saliency = (expected * model.weight.detach()).abs().flatten()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = regrow.sparsify(model, optimizer, methods.snip(0.5), storage=storage, batches=data, loss=squares)
    assert sparsifier.topologies["weight"].indices.tolist() == sorted(saliency.topk(9).indices.tolist())


@pytest.mark.parametrize("part", ["0", "1"])
def test_a_model_without_values_is_refused_before_it_runs(part: str) -> None:
    model = nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3))
    model.get_submodule(part).to("meta")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=rf"of the model's 7 tensors lie on the meta device.*\({part}\..*real device"):
        regrow.sparsify(model, optimizer, methods.snip(0.5), storage="compressed", batches=batches(1), loss=squares)
