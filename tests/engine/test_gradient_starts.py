"""A start that needs a gradient: instead of the first step, or from batches before it."""

from __future__ import annotations

import copy
import itertools

import torch
from torch import Tensor, nn

from regrow import methods, sparsify
from regrow.parts.allocation import uniform
from support.loops import (
    MAKE,
    data,
    dense_gradients,
    loss_of,
    masks,
    mlp,
    require_zero_outside,
    same,
    start,
    train,
)


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
